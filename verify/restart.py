"""The same requests in a new process: ``python -m isobit.verify.restart`` is that process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EngineError
from ..sampling.params import SamplingParams
from .transcript import Transcript
from .workload import Case


@dataclass(frozen=True, slots=True)
class RestartSpec:
    """The options that build the same engine again, and its thread count."""

    options: Mapping[str, Any]
    num_threads: int


def run_in_new_process(spec: RestartSpec, cases: Sequence[Case]) -> list[Transcript]:
    """Transcripts of the cases, each alone, from an engine in a process of its own.

    :raises EngineError: that process failed; the message has the end of its stderr.
    """
    question = {
        "options": dict(spec.options),
        "num_threads": spec.num_threads,
        "cases": [
            {"name": c.name, "prompt": c.prompt_token_ids, "params": _params_json(c.params)}
            for c in cases
        ],
    }
    done = subprocess.run(
        [sys.executable, "-m", "isobit.verify.restart"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EngineError(f"the new process of the restart proof failed:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return [Transcript(tuple((token, bytes.fromhex(b)) for token, b in item)) for item in answer]


def main() -> None:
    """Read a question from stdin, run it, write the transcripts to stdout."""
    import torch

    from ..core.llm import LLM
    from .drive import as_transcripts, drive_alone

    question = json.load(sys.stdin)
    torch.set_num_threads(question["num_threads"])
    cases = [
        Case(c["name"], tuple(c["prompt"]), SamplingParams.from_mapping(c["params"]))
        for c in question["cases"]
    ]
    with LLM(**question["options"]) as llm:
        found = as_transcripts(drive_alone(llm.engine, cases))
    print(json.dumps([[(token, bits.hex()) for token, bits in item.tokens] for item in found]))


def _params_json(params: SamplingParams) -> dict[str, Any]:
    fields = asdict(params)
    fields["logit_bias"] = {str(token): bias for token, bias in params.bias_pairs} or None
    return fields


if __name__ == "__main__":
    main()
