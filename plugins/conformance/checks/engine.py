"""Does a whole engine hold its invariances on the backend?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..check import Check, Context, Finding, needs
from ..corners import Corners

if TYPE_CHECKING:
    from ....core.engine import Engine
    from ....verify.workload import Case

_CELLS = ("deterministic", "chunked_prefill", "radix_cache", "non_greedy_sampling")
_KV_BYTES = 2**28  # enough, and room on a GPU for what else is there

_EVIDENCE = {
    "batch": ("deterministic", "non_greedy_sampling"),
    "order": ("deterministic", "non_greedy_sampling"),
    "chunk": ("chunked_prefill",),
    "cache": ("radix_cache",),
    "preempt": ("deterministic",),
    "score": ("decode_equals_prefill",),
}
"""What each invariance of the engine is evidence for."""


def _engine(context: Context) -> Iterator[Finding]:
    """A random model of the backend's shape, through the proofs of ``isobit verify``."""
    from ....core.config import EngineConfig
    from ....core.startup import start_engine
    from ....verify.judge import judge_all

    corners, subject = context.corners, context.subject
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_model(corners)))
        config = EngineConfig(
            model=folder,
            load_format="random",
            attention_backend=subject.spec.name,
            device=corners.device,
            dtype=corners.base.dtype,
            page_size=corners.base.page_size,
            max_num_seqs=64,
            kv_cache_memory=_KV_BYTES,
        )
        try:
            engine, _ = start_engine(config, subject.host)
            for verdict in judge_all(engine, _cases(engine, corners), None):
                cells = _declared(verdict.invariance, corners)
                if cells and verdict.skipped is None:
                    yield Finding(f"engine: {verdict.invariance}", cells, verdict.failure or "")
        except Exception as error:  # whatever a backend raises is its answer
            yield Finding("engine", _CELLS, f"it raised {type(error).__name__}: {error}")


def _declared(invariance: str, corners: Corners) -> tuple[str, ...]:
    """The cells of an invariance that the backend declares at all."""
    cells = _EVIDENCE.get(invariance, ())
    if "decode_equals_prefill" in cells and not corners.capabilities.decode_equals_prefill:
        return ()
    return tuple(
        cell
        for cell in cells
        if cell in ("deterministic", "decode_equals_prefill") or corners.lacks(cell) is None
    )


def _cases(engine: Engine, corners: Corners) -> list[Case]:
    from ....verify.workload import make_cases

    page = corners.base.page_size
    lengths = sorted({1, 17, 63, 130, page - 1, page, 300} - {0})
    return make_cases(
        None, engine.vocab_size, lengths, max_new_tokens=6, temperature=0.0, sampling_seed=None
    )


def _model(corners: Corners) -> dict[str, object]:
    base = corners.base
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": base.dtype,
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": base.head_dim,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _elsewhere(corners: Corners) -> str | None:
    from ....core.config import DEVICES

    if corners.device in DEVICES:
        return None
    return f"the engine runs on {', '.join(DEVICES)} only"


CHECKS: tuple[Check, ...] = (
    Check(
        "engine",
        "a whole engine keeps batch, order, chunk, cache, preemption and sampled tokens",
        _CELLS,
        needs("deterministic"),
        _engine,
        _elsewhere,
    ),
)
