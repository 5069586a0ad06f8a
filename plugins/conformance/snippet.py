"""A failing trial as a program that repeats it."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from .scenario import Piece, Trial
from .subject import Subject


def snippet(subject: Subject, trial: Trial) -> str:
    """A Python program; it prints the difference and exits with status 1, or prints ``holds``."""
    factory = f"{subject.factory.__module__}:{subject.factory.__qualname__}"
    return (
        "from isobit.plugins.conformance import Geometry, Piece, Run, Sequence, Trial, repeat\n\n"
        f'repeat(\n    "{factory}",\n{_indented(_source(trial))},\n)\n'
    )


def _source(value: Any) -> str:
    """The value as Python source, without what is default."""
    if isinstance(value, Piece):
        mark = ", decode=True" if value.decode else ""
        return f"Piece({value.sequence}, {value.start}, {value.stop}{mark})"
    if is_dataclass(value) and not isinstance(value, type):
        told = [
            f"{f.name}={_source(getattr(value, f.name))},"
            for f in fields(value)
            if f.default is MISSING or getattr(value, f.name) != f.default
        ]
        name = type(value).__name__
        short = f"{name}({' '.join(told).removesuffix(',')})"
        if len(short) <= 80 and "\n" not in short:
            return short
        return f"{name}(\n" + "\n".join(map(_indented, told)) + "\n)"
    if isinstance(value, tuple):
        inner = [_source(item) for item in value]
        short = f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
        if len(short) <= 88 and "\n" not in short:
            return short
        return "(\n" + "\n".join(f"{_indented(item)}," for item in inner) + "\n)"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
