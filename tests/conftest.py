"""Options of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when it is imported, so it is set before any test can import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="the engine's random programs ten times as long; all checks on all mutants",
    )
