"""Commands that end with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_GRACE = 5.0
"""Seconds in which a command that is asked to end may end what it runs in this way itself."""

_under_way: set[subprocess.Popen[str]] = set()


def run_whole(
    command: Sequence[str], timeout: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` in a session of its own, which is ended after ``timeout`` seconds.

    A command that itself uses this has sessions below, which its own end does not reach: it calls
    ``end_on_request`` first.

    :raises subprocess.TimeoutExpired: with what was printed until then.
    """
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    _under_way.add(process)
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as error:
        output, errors = _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise subprocess.TimeoutExpired(command, timeout, output, errors) from None
        raise
    finally:
        _under_way.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def end_on_request() -> None:
    """On SIGTERM, end what ``run_whole`` runs, then this process."""

    def end(number: int, frame: object) -> None:
        for process in list(_under_way):
            _signal(process, signal.SIGKILL)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ask for the end, then enforce it; what was printed."""
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_GRACE)
    _signal(process, signal.SIGKILL)
    return process.communicate()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, number)
