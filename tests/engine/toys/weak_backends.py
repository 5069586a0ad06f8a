"""A plugin of backends that are as weak as they declare, and of the same under bold claims."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from isobit.plugins import BackendSpec, Capabilities, Supported, Unsupported, hookimpl

FEATURES = ("cuda_graph", "chunked_prefill", "radix_cache", "non_greedy_sampling")
MODEL_FEATURES = ("sliding_window", "logit_soft_cap")


@dataclass(frozen=True)
class Promises:
    """What the bits of a toy depend on, and so what it may declare."""

    chunk_invariant: bool = True
    alignment: int = 1
    decode_equals_prefill: bool = True

    def __str__(self) -> str:
        cuts = f"cuts-at-{self.alignment}" if self.chunk_invariant else f"no-cuts-{self.alignment}"
        return f"{cuts}-decode-{'equal' if self.decode_equals_prefill else 'apart'}"

    @property
    def class_name(self) -> str:
        return "".join(word.capitalize() for word in str(self).split("-"))


STRONG = Promises()
ALL = tuple(Promises(*each) for each in product((True, False), (1, 24, 32), (True, False)))
"""24 is no multiple of a page of 16 tokens, and 32 is two of them."""
WEAK = tuple(promises for promises in ALL if promises != STRONG)


def spec(name: str, kept: Promises, declared: Promises) -> BackendSpec:
    return BackendSpec(
        name=name,
        api=1,
        factory=f"weak_attention:{kept.class_name}",
        capabilities=Capabilities(
            dtypes={"float32"},
            devices={"cpu"},
            features=dict.fromkeys((*FEATURES, *MODEL_FEATURES), Supported()),
            deterministic=True,
            chunk_invariant=declared.chunk_invariant,
            alignment=declared.alignment,
            decode_equals_prefill=declared.decode_equals_prefill,
        ),
    )


def without(feature: str) -> BackendSpec:
    """The strong one, but for a feature."""
    strong = spec(f"without-{feature}", STRONG, STRONG)
    features = strong.capabilities.features | {feature: Unsupported(f"no toy has {feature}")}
    return replace(strong, capabilities=replace(strong.capabilities, features=features))


@hookimpl
def isobit_attention_backends() -> list[BackendSpec]:
    return [
        *(spec(str(promises), promises, promises) for promises in ALL),
        *(spec(f"bold-{promises}", promises, STRONG) for promises in WEAK),
        *(without(feature) for feature in (*FEATURES, *MODEL_FEATURES)),
    ]
