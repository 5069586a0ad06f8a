"""The start-up report: what was chosen and why, and the fingerprint that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..backends.matrix import Resolved, Selection
from ..backends.rules import installed_version
from ..models.config import ModelConfig
from ..plugins.manager import PluginHost
from .config import EngineConfig
from .devices import describe_device, no_cuda
from .graphs import DecodeGraphs
from .kernel_choice import KernelChoice
from .memory import DeviceMemory
from .phases import WEIGHTS
from .pieces import PiecewiseGraphs


@dataclass(frozen=True, slots=True)
class StartupReport:
    """What was chosen at start and why.

    ``rows`` are (item, choice, why); ``fingerprint_parts`` are hashed into ``fingerprint``;
    ``phases`` has the seconds of each phase of the start, by the names of ``core/phases.py``.
    """

    rows: tuple[tuple[str, str, str], ...]
    fingerprint: str
    fingerprint_parts: Mapping[str, str]
    phases: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole start."""
        return sum(self.phases.values())

    @property
    def seconds_without_weights(self) -> float:
        """What a start takes beside reading or drawing the weights."""
        return self.seconds - self.phases[WEIGHTS]

    def __str__(self) -> str:
        item = max(len(row[0]) for row in self.rows)
        choice = min(48, max(len(row[1]) for row in self.rows))
        return "\n".join(f"{a:{item}}  {b:{choice}}  {c}".rstrip() for a, b, c in self.rows)


def fingerprint_parts(
    config: EngineConfig,
    model: ModelConfig,
    weights: str,
    dtype: torch.dtype,
    selection: Selection,
    choice: KernelChoice,
    device: torch.device,
) -> dict[str, str]:
    """Everything that the bits depend on but the request."""
    from .. import __version__

    backend = f"{selection.spec.name} ({selection.distribution} {selection.version})"
    parts = {
        "isobit": __version__,
        "weights": weights,
        "model": repr(model),
        "dtype": str(dtype),
        "deterministic": str(config.deterministic),
        "sampling_seed": str(config.sampling_seed),
        "attention_backend": backend,
        "kernels": choice.kernels.name,
        "self_check": choice.digest,
        "torch": torch.__version__,
        "device": f"{device.type} {describe_device(device)}",
    }
    if device.type == "cuda":
        parts["cuda"] = str(torch.version.cuda)
        parts["triton"] = installed_version("triton") or "not installed"
    return parts


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """A short digest over all parts, whatever their order."""
    text = "\n".join(f"{key}={value}" for key, value in sorted(parts.items()))
    return "ib-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def report_rows(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    selection: Selection,
    choice: KernelChoice,
    num_pages: int,
    max_model_len: int,
    host: PluginHost,
) -> list[tuple[str, str, str]]:
    """The report's rows: (item, choice, why)."""
    why = "asked for" if config.attention_backend != "auto" else "first that holds what is asked"
    skipped = [(f"  not {name}", "", reason) for name, reason in selection.rejected.items()]
    features = [(f"  {name}", _on_off(cell), cell.why) for name, cell in selection.features.items()]
    disabled = [
        (f"  plugin {record.name}", record.status, record.reason)
        for record in host.records()
        if record.status == "disabled"
    ]
    problems = [("  problem", "", problem) for problem in host.problems()]
    tokens = num_pages * config.page_size
    dtype_name = str(dtype).removeprefix("torch.")
    return [
        ("model", config.model, f"{model.architecture}, {dtype_name}, context {max_model_len}"),
        ("deterministic", str(config.deterministic).lower(), ""),
        ("attention backend", selection.spec.name, why),
        *skipped,
        *disabled,
        *problems,
        *features,
        ("kernels", choice.kernels.name, choice.why),
        ("KV cache", f"{num_pages} pages", f"{tokens} tokens in pages of {config.page_size}"),
    ]


def library_parts(library: str, digest: str) -> dict[str, str]:
    """What the bits depend on of a library that the attention backend found, if it found one."""
    parts = {"attention_library": library, "attention_self_check": digest}
    return {key: value for key, value in parts.items() if value}


def library_rows(library: str, digest: str) -> list[tuple[str, str, str]]:
    """Which library serves attention, and that it proved itself, if there is one to be named."""
    if not (library or digest):
        return []
    why = f"self-check {digest}" if digest else "not checked"
    return [("attention library", library or "its own", why)]


def device_rows(
    config: EngineConfig, device: torch.device, memory: DeviceMemory | None, kv_bytes: int
) -> list[tuple[str, str, str]]:
    """What the engine runs on and, on a GPU, where its memory goes."""
    why = "auto" if config.device == "auto" else "asked for"
    rows = [("device", device.type, f"{why}: {describe_device(device)}")]
    if config.device == "auto" and (reason := no_cuda()):
        rows.append(("  not cuda", "", reason))
    if memory is not None:
        step = _gib(memory.peak - memory.weights)
        left = _gib(torch.cuda.mem_get_info(device)[0])
        about = f"{_gib(memory.weights)} weights, {step} a step, {_gib(kv_bytes)} KV, {left} free"
        rows.append(("memory", f"{_gib(memory.total)} GiB", f"{about} (GiB)"))
    return rows


def steps_row(config: EngineConfig, device: torch.device) -> tuple[str, str, str]:
    """A step's tokens, and whether the host waits for it."""
    ahead = config.steps_ahead(device.type)
    how = "the next is launched before one is read" if ahead else "each is read before the next"
    return (
        "steps",
        "async" if ahead else "sync",
        f"{config.token_budget(device.type)} tokens; {how}",
    )


def graphs_row(graphs: DecodeGraphs) -> tuple[str, str, str]:
    """How many decode steps were captured, and what that took."""
    count, most = len(graphs.sizes), graphs.sizes[-1]
    took = f"{graphs.seconds:.1f} s, {_gib(graphs.memory)} GiB"
    return ("CUDA graphs", f"{count} captured", f"decode steps of up to {most} requests; {took}")


def pieces_row(pieces: PiecewiseGraphs) -> tuple[str, str, str]:
    """The same of the steps with a prefill."""
    count, most = len(pieces.sizes), pieces.sizes[-1]
    took = f"{pieces.seconds:.1f} s, {_gib(pieces.memory)} GiB"
    about = f"steps with a prefill of up to {most} tokens, attention apart; {took}"
    return ("  in pieces", f"{count} captured", about)


def phases_row(seconds: Mapping[str, float]) -> tuple[str, str, str]:
    """How long the start took, and each phase of it that took any time to speak of."""
    total = sum(seconds.values())
    parts = [f"{phase} {took:.1f}" for phase, took in seconds.items() if took >= 0.05]
    without = f"{total - seconds[WEIGHTS]:.1f} without weights"
    return ("start-up", f"{total:.1f} s", ", ".join([*parts, without]))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def promise(config: EngineConfig) -> str:
    """What an equal fingerprint means under these options."""
    if config.deterministic:
        return "equal fingerprint and request: equal bits"
    return "no bits are promised: the constraints are lifted"


def _on_off(cell: Resolved) -> str:
    return "on" if cell.value else "off"
