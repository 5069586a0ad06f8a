"""What every benchmark says of its engine, and how it writes numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.llm import LLM


def about(llm: LLM) -> dict[str, Any]:
    """The engine, for a row of JSON."""
    import torch

    runner = llm.engine.runner
    return {
        "model": llm.config.model,
        "device": runner.backend.config.device.type,
        "dtype": str(runner.decoder.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "deterministic": llm.config.deterministic,
        "kernels": runner.kernels.name,
        "attention_backend": runner.backend_name,
        "fingerprint": llm.fingerprint,
    }


def headline(said: dict[str, Any]) -> str:
    """The same in a line of text, and in a second one the device's limits, if ``said`` has them."""
    engine = (
        "{model}, {device}, {dtype}, {threads} threads, kernels {kernels}, attention "
        "{attention_backend}, {fingerprint}"
    )
    limits = (
        "\ncopy {copy_gb_per_s:.4g} GB/s, {matrix_dtype} product {matrix_tflop_per_s:.3g} TFLOP/s"
    )
    return (engine + limits if "matrix_dtype" in said else engine).format(**said)


def number(value: float | str | None) -> str:
    """Three digits, or all before the point; ``-`` for what is not known."""
    if value is None:
        return "-"
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
