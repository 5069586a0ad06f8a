"""A third-party backend, as small as one gets: what it declares."""

from isobit import plugins


@plugins.hookimpl
def isobit_attention_backends():
    capabilities = plugins.Capabilities(
        dtypes={"float32"},
        devices={"cpu"},
        features={"chunked_prefill": plugins.Supported()},
        deterministic=True,
        chunk_invariant=True,
    )
    factory = "isobit_toy_attention:ToyAttention"
    return [plugins.BackendSpec(name="toy", api=1, factory=factory, capabilities=capabilities)]
