"""The mutants by name, and which checks must catch them. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from ....backends.capabilities import API_VERSION, FEATURES, BackendSpec, Capabilities, Supported
from ....backends.matrix import load_factory
from ...discovery import DISTRIBUTION, Candidate
from ...hookspecs import hookimpl

_PACKAGE = "isobit.plugins.conformance.mutants"
_ANYWHERE = frozenset({"cpu", "cuda"})


@dataclass(frozen=True, slots=True)
class Mutant:
    """A backend that is wrong in one way.

    caught_by: the checks that fail on it, the first of the suite's order first
    """

    spec: BackendSpec
    caught_by: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def fault(self) -> str:
        """What is wrong, in a sentence: its class's docstring begins with it."""
        return self._said[0]

    @property
    def seen(self) -> str:
        """Where such a fault comes from: the docstring's second sentence."""
        return self._said[1]

    @property
    def _said(self) -> tuple[str, str]:
        text = " ".join((load_factory(self.spec).__doc__ or "").split())
        fault, _, rest = text.partition(" Seen ")
        return fault, rest.partition(".")[0]


def _capabilities(
    dtypes: set[str],
    head_dims: set[int] | None,
    page_sizes: set[int] | None,
    engine_writes_kv: bool = False,
    devices: frozenset[str] = _ANYWHERE,
) -> Capabilities:
    return Capabilities(
        dtypes=dtypes,
        devices=devices,
        head_dims=head_dims,
        page_sizes=page_sizes,
        features={feature: Supported() for feature in FEATURES},
        deterministic=True,
        chunk_invariant=True,
        decode_equals_prefill=True,
        engine_writes_kv=engine_writes_kv,
    )


def _mutant(
    factory: str,
    *caught_by: str,
    dtype: str = "float32",
    engine_writes_kv: bool = False,
    devices: frozenset[str] = _ANYWHERE,
) -> Mutant:
    """A mutant declares what the right one does, of fewer shapes: it is judged the sooner.

    :param devices: those on which its fault shows
    """
    module, _, words = factory.partition(":")
    name = "".join(f"-{c.lower()}" if c.isupper() else c for c in words)
    spec = BackendSpec(
        name=f"mutant{name}",
        api=API_VERSION,
        factory=f"{_PACKAGE}.{module}:{words}",
        capabilities=_capabilities({dtype}, {8, 12, 16}, {7, 16, 24}, engine_writes_kv, devices),
    )
    return Mutant(spec, caught_by)


def _right(name: str, engine_writes_kv: bool) -> BackendSpec:
    return BackendSpec(
        name=name,
        api=API_VERSION,
        factory=f"{_PACKAGE}.right:RightAttention",
        capabilities=_capabilities(
            {"float32", "bfloat16", "float16"}, None, None, engine_writes_kv
        ),
    )


RIGHT = _right("mutant-none", engine_writes_kv=False)
"""The backend that the mutants were made from: it holds everything there is to declare."""

RIGHT_WRITTEN = _right("mutant-none-written", engine_writes_kv=True)
"""The same with its K and V written by the engine."""

MUTANTS: tuple[Mutant, ...] = (
    _mutant("masks:CausalOffByOne", "reference"),
    _mutant("masks:ScaleMissing", "reference"),
    _mutant("masks:WindowOffByOne", "window"),
    _mutant("masks:CapAfterMask", "soft cap"),
    _mutant("masks:HeadsInterleaved", "reference"),
    _mutant("masks:GroupsOfEight", "groups"),
    _mutant("masks:PositionFromChunk", "chunk"),
    _mutant("masks:SharedMaximum", "reference"),
    _mutant("masks:Tf32Products", "reference"),
    _mutant("masks:WeightsInBfloat16", "reference"),
    _mutant("masks:ScoresInFloat16", "reference", dtype="float16"),
    _mutant("splits:SplitsByBatch", "batch"),
    _mutant("splits:SplitsByLongest", "batch"),
    _mutant("splits:TileByRows", "batch"),
    _mutant("splits:PrefixApart", "chunk"),
    _mutant("splits:CompletionOrder", "rerun"),
    _mutant("splits:DecodeApart", "prefix", "decode"),
    _mutant("splits:TunedByFirstCall", "batch"),
    _mutant("splits:StalePartials", "reference"),
    _mutant("pages:NeighboursPages", "reference"),
    _mutant("pages:StaleLastPage", "reference"),
    _mutant("pages:TailNotCleared", "unwritten"),
    _mutant("pages:TailWritten", "writes"),
    _mutant("pages:TailCleared", "writes", engine_writes_kv=True),
    _mutant("pages:PaddingWritten", "graph"),
    _mutant("pages:PastTheEnd", "writes"),
    _mutant("pages:OnePageAChunk", "reference"),
    _mutant("pages:WrittenLate", "reference"),
    _mutant("pages:RowsByLength", "reference"),
    _mutant("pages:OutAdded", "reference"),
    _mutant("pages:PhysicalOrder", "pages"),
    _mutant("pages:GatheredOnce", "layers"),
    _mutant("pages:HostBufferReused", "reference", devices=frozenset({"cuda"})),
    _mutant("graphs:CapturedLengths", "graph"),
    _mutant("graphs:CapturedPages", "graph"),
    _mutant("graphs:CapturedGrid", "graph"),
    _mutant("graphs:SharedWorkspace", "graph"),
    _mutant("graphs:WaitsForDevice", "graph"),
    _mutant("declarations:NoCapture", "graph"),
    _mutant("declarations:WindowIgnored", "window"),
    _mutant("declarations:CapIgnored", "soft cap"),
    _mutant("declarations:PowerOfTwoHeads", "shapes"),
    _mutant("declarations:PowerOfTwoPages", "shapes"),
    _mutant("declarations:SeedsTheWorld", "generators"),
)


def candidates() -> list[Candidate]:
    """What a ``PluginHost`` loads to have the right backend and every mutant."""
    return [
        _candidate(spec) for spec in (RIGHT, RIGHT_WRITTEN, *(mutant.spec for mutant in MUTANTS))
    ]


def _candidate(spec: BackendSpec) -> Candidate:
    from .... import __version__

    def backends() -> list[BackendSpec]:
        return [spec]

    plugin = SimpleNamespace(isobit_attention_backends=hookimpl(backends))
    return Candidate(spec.name, DISTRIBUTION, __version__, _PACKAGE, lambda: plugin)
