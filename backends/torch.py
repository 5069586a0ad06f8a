"""The plugin of the embedded torch backend. It loads like any other, by its entry point."""

from __future__ import annotations

from ..plugins import BackendSpec, Capabilities, Supported, Unsupported, hookimpl


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    """The embedded backend: every invariance, on any CPU, and slowly on any CUDA device."""
    return [
        BackendSpec(
            name="torch",
            api=1,
            factory="isobit.backends.torch_attention:TorchAttention",
            capabilities=Capabilities(
                dtypes={"float32", "bfloat16"},
                devices={"cpu", "cuda"},
                head_dims=set(range(8, 257, 8)),
                page_sizes=set(range(1, 257)),
                features={
                    "cuda_graph": Unsupported(
                        "its shapes follow the lengths, which the host reads"
                    ),
                    "chunked_prefill": Supported(),
                    "radix_cache": Supported(),
                    "non_greedy_sampling": Supported(),
                    "sliding_window": Unsupported("the kernels attend to every earlier token"),
                    "logit_soft_cap": Unsupported("the kernels do not cap scores"),
                },
                deterministic=True,
                chunk_invariant=True,
                decode_equals_prefill=True,
                engine_writes_kv=True,
            ),
        )
    ]
