"""The plugin of the backend on FlashAttention 3. It loads like any other, by its entry point."""

from __future__ import annotations

from ..plugins import (
    BackendSpec,
    Capabilities,
    Refusal,
    Requirements,
    Supported,
    Unsupported,
    hookimpl,
)
from .fa3_providers import find_library, install_line

NAME = "fa3"
LIBRARY = "FlashAttention 3 of flash_attn_3, vllm or sgl_kernel"


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    """FlashAttention 3 on Hopper, by whichever library is installed.

    Pages of more than 64 tokens are not offered: multiples of the kernel's tile are read by TMA
    with their unwritten tail, and a weight of 0 times NaN is NaN. A head_dim of 256 is not tried.
    """
    return [
        BackendSpec(
            name=NAME,
            api=1,
            factory="isobit.backends.fa3_attention:FlashAttention3",
            also_requires=LIBRARY,
            install=install_line(),
            self_check=True,
            capabilities=Capabilities(
                dtypes={"bfloat16", "float16"},
                devices={"cuda"},
                compute_capability=(9, 0),
                highest_compute_capability=(9, 0),
                head_dims={64, 96, 128, 192},
                page_sizes={1, 2, 4, 8, 16, 32, 64},
                features={
                    "cuda_graph": Supported(),
                    "chunked_prefill": Supported(),
                    "radix_cache": Supported(),
                    "non_greedy_sampling": Supported(),
                    "sliding_window": Unsupported(
                        "under a window some rows' bits follow where the prompt was cut"
                    ),
                    "logit_soft_cap": Unsupported(
                        "not tried: the kernel's tanh is an approximation, good to 11 bits"
                    ),
                },
                deterministic=True,
                chunk_invariant=True,
                decode_equals_prefill=True,
                engine_writes_kv=True,
            ),
        )
    ]


@hookimpl
def isobit_check(config: Requirements, spec: BackendSpec) -> list[Refusal]:
    """One of several libraries must be installed, which ``requires`` cannot say."""
    if spec.name != NAME or find_library() is not None:
        return []
    return [Refusal("requires", LIBRARY, "none is installed", f"Install one: {install_line()}")]
