"""Commands that end with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def run_whole(
    command: Sequence[str], timeout: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` in a session of its own, which is killed after ``timeout`` seconds.

    :raises subprocess.TimeoutExpired: with what was printed until then.
    """
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise subprocess.TimeoutExpired(command, timeout, output, errors) from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
