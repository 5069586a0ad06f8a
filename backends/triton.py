"""The plugin of the embedded CUDA backend. It loads like any other, by its entry point."""

from __future__ import annotations

from ..plugins import BackendSpec, Capabilities, Supported, hookimpl


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    """The embedded backend for CUDA devices: every invariance and every feature."""
    return [
        BackendSpec(
            name="triton",
            api=1,
            factory="isobit.backends.triton_attention:TritonAttention",
            requires=("triton>=3.5",),
            install="pip install 'triton>=3.5'",
            capabilities=Capabilities(
                dtypes={"float32", "bfloat16", "float16"},
                devices={"cuda"},
                compute_capability=(8, 0),
                head_dims=set(range(16, 257, 8)),
                page_sizes=set(range(1, 257)),
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
                decode_equals_prefill=True,
                engine_writes_kv=True,
            ),
        )
    ]
