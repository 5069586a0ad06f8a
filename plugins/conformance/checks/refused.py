"""Is what a backend does not declare refused before anything runs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ....backends.capabilities import FEATURES, Requirements, Unsupported
from ....backends.rules import refusals
from ..check import CONTRACT, Check, Context, Finding
from ..corners import Corners

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = (1, 8, 16, 17, 64, 72, 100, 128, 160, 256, 512)


def _plain(corners: Corners) -> Requirements:
    """A start-up that the backend can serve."""
    base, offers = corners.base, corners.capabilities
    return Requirements(
        dtype=base.dtype,
        head_dim=base.head_dim,
        page_size=base.page_size,
        device=corners.device,
        compute_capability=offers.compute_capability,
        deterministic=offers.deterministic,
        features=dict.fromkeys(FEATURES),
    )


def _undeclared(corners: Corners) -> Iterator[tuple[str, str, Requirements]]:
    """Start-ups that ask for one thing too much: the rule that must refuse, and what was asked."""
    plain, offers = _plain(corners), corners.capabilities
    for dtype in _DTYPES:
        if dtype not in offers.dtypes:
            yield "dtype", dtype, replace(plain, dtype=dtype)
    for size in _SIZES:
        if offers.head_dims is not None and size not in offers.head_dims:
            yield "head_dim", str(size), replace(plain, head_dim=size)
        if offers.page_sizes is not None and size not in offers.page_sizes:
            yield "page_size", str(size), replace(plain, page_size=size)
    for device in ("cpu", "cuda"):
        if device not in offers.devices:
            yield "device", device, replace(plain, device=device)
    if not offers.deterministic:
        yield "deterministic", "True", replace(plain, deterministic=True)
    for feature in FEATURES:
        if isinstance(offers.cell(feature), Unsupported):
            yield feature, "True", replace(plain, features={**plain.features, feature: True})


def _refused(context: Context) -> Iterator[Finding]:
    spec = context.subject.spec
    found = refusals(_plain(context.corners), spec)
    yield Finding("what is declared is served", (CONTRACT,), "; ".join(map(str, found)))
    for rule, asked, requirements in _undeclared(context.corners):
        refused = rule in {refusal.rule for refusal in refusals(requirements, spec)}
        failure = "" if refused else f"{rule} {asked} is not declared, and was not refused"
        yield Finding(f"{rule} {asked} is refused", (CONTRACT,), failure)


CHECKS: tuple[Check, ...] = (
    Check(
        "refused",
        "what is not declared is refused at start-up",
        (CONTRACT,),
        lambda corners: None,
        _refused,
    ),
)
