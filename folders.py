"""Where Isobit keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$ISOBIT_CACHE``, else ``$XDG_CACHE_HOME/isobit``, else ``~/.cache/isobit``."""
    if chosen := os.environ.get("ISOBIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isobit"
