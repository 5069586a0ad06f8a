"""The plugin: what the SDPA backend declares. It imports no torch."""

from __future__ import annotations

from isobit.plugins import BackendSpec, Capabilities, Supported, Unsupported, hookimpl


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    """One backend for CPU and CUDA: every invariance, at the price of whole tiles."""
    return [
        BackendSpec(
            name="sdpa",
            api=1,
            factory="isobit_sdpa_attention:SdpaAttention",
            requires=("torch>=2.11",),
            install="pip install 'torch>=2.11'",
            capabilities=Capabilities(
                dtypes={"float32", "bfloat16", "float16"},
                devices={"cpu", "cuda"},
                head_dims=set(range(8, 257, 8)),
                features={
                    "cuda_graph": Unsupported("the gather's shape follows the lengths"),
                    "chunked_prefill": Supported(),
                    "radix_cache": Supported(),
                    "non_greedy_sampling": Supported(),
                    "sliding_window": Supported(),
                    "logit_soft_cap": Unsupported("SDPA has no place between scores and mask"),
                },
                deterministic=True,
                chunk_invariant=True,
                decode_equals_prefill=True,
            ),
        )
    ]
