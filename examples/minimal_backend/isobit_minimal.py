"""The plugin: what the minimal backend declares. It imports no torch."""

from isobit.plugins import BackendSpec, Capabilities, Supported, Unsupported, hookimpl

REASON = "a row's bits follow from the rows it is computed with"


@hookimpl
def isobit_attention_backends():
    capabilities = Capabilities(
        dtypes={"float32"},
        devices={"cpu"},
        features={
            "non_greedy_sampling": Supported(),
            "chunked_prefill": Unsupported(REASON),
            "radix_cache": Unsupported(REASON),
        },
        deterministic=True,
    )
    factory = "isobit_minimal_attention:MinimalAttention"
    return [BackendSpec(name="minimal", api=1, factory=factory, capabilities=capabilities)]
