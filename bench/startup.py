"""An engine's start in a new process, and its phases: ``python -m isobit.bench.startup``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EngineError, IsobitError

_CACHES = {"ISOBIT_CACHE": "isobit", "TRITON_CACHE_DIR": "triton"}
"""Where choices of kernels and compiled kernels are kept: variables and folders."""


def start_once(options: Mapping[str, Any], caches: Path | None) -> dict[str, Any]:
    """Start an engine with these options in a process of its own, and end it.

    :param caches: the folder for what is kept between starts; None takes the user's own.
    :returns: seconds: ``process`` from its launch to a ready engine, ``imports`` of Python and its
        packages, ``engine`` of its start, ``phases`` of that, and ``without_weights``: the process
        less its phase of the weights. And the ``fingerprint``.
    :raises ConfigError: the engine refused to start; the message is its own.
    :raises EngineError: the process failed; the message has the end of its stderr.
    """
    folders = {} if caches is None else {k: str(caches / v) for k, v in _CACHES.items()}
    launched = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "isobit.bench.startup"],
        input=json.dumps({"options": dict(options), "launched": launched}),
        env=os.environ | folders,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EngineError(f"the process that was to start failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise ConfigError(found["refused"])
    return found


def main() -> None:
    """Read options from stdin, start an engine, write the times to stdout."""
    question = json.load(sys.stdin)
    from ..core.llm import LLM

    imported = time.time()
    try:
        llm = LLM(**question["options"])
    except IsobitError as error:
        print(json.dumps({"refused": str(error)}))
        return
    ready = time.time()
    process = ready - question["launched"]
    times = {
        "process": process,
        "imports": imported - question["launched"],
        "engine": ready - imported,
        "without_weights": process - llm.report.phases["weights"],
        "phases": dict(llm.report.phases),
        "fingerprint": llm.fingerprint,
    }
    llm.close()
    print(json.dumps(times))


if __name__ == "__main__":
    main()
