"""The plugin of the FlashInfer backend. It loads like any other, by its entry point.

What is declared was read in the source of the one version that is admitted: its planner decides
what the bits depend on, and another version's may decide otherwise.
"""

from __future__ import annotations

from ..plugins import BackendSpec, Capabilities, Refusal, Requirements, Supported, hookimpl

NAME = "flashinfer"
INSTALL = "pip install 'isobit[flashinfer]'"

_HOPPER = 9  # major compute capability


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    """FlashInfer: chunk-invariant prefill, tensor-core decode, of other bits than the prefill."""
    return [
        BackendSpec(
            name=NAME,
            api=1,
            factory="isobit.backends.flashinfer_attention:FlashInferAttention",
            requires=("flashinfer-python==0.6.14",),
            install=INSTALL,
            capabilities=Capabilities(
                dtypes={"bfloat16", "float16"},
                devices={"cuda"},
                compute_capability=(8, 0),
                head_dims={64, 128, 256},
                page_sizes={1, 2, 4, 8, 16, 32, 64, 128, 256},
                features={
                    "cuda_graph": Supported(),
                    "chunked_prefill": Supported(),
                    "radix_cache": Supported(),
                    "non_greedy_sampling": Supported(),
                    "sliding_window": Supported(),
                    "logit_soft_cap": Supported(),
                },
                deterministic=True,
                chunk_invariant=True,
                decode_equals_prefill=False,
                engine_writes_kv=True,
            ),
        )
    ]


@hookimpl
def isobit_check(config: Requirements, spec: BackendSpec) -> list[Refusal]:
    """Determinism needs FlashInfer's ``fa3`` prefill, which exists for Hopper alone."""
    have = config.compute_capability
    if spec.name != NAME or not config.deterministic or have is None or have[0] == _HOPPER:
        return []
    return [
        Refusal(
            "compute_capability",
            f"a deterministic prefill on {have[0]}.{have[1]}",
            f"one on {_HOPPER}.x: elsewhere FlashInfer's query tile, and with it the bits, follows "
            "the batch",
            "Choose another backend, or pass deterministic=False.",
        )
    ]
