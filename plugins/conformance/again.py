"""Runs one trial again: what a printed snippet calls."""

from __future__ import annotations

import importlib
import sys

from ...errors import ConfigError
from .judge import Judge
from .scenario import Trial


def repeat(factory: str, trial: Trial) -> None:
    """Run ``trial`` on the class ``"module:Class"``; exit with status 1 and the difference.

    :raises ConfigError: there is no such class.
    """
    module, _, name = factory.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ConfigError(f"{factory!r} is no class: {module} has no {name!r}.")
    difference = Judge(found).judge(trial)
    if difference is not None:
        sys.exit(difference.message)
    print("holds")
