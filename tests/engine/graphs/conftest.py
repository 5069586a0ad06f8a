"""Engines of the suite's own backends on a CPU, where captures are tapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from isobit.core.config import EngineConfig
from isobit.core.engine import Engine
from isobit.core.startup import start_engine
from isobit.plugins.conformance.mutants.catalogue import candidates
from isobit.plugins.manager import PluginHost


@pytest.fixture(scope="session")
def config_of(small_folder: Path) -> Callable[..., EngineConfig]:
    """The options of a small engine on a backend, and whatever else is given."""

    def make(backend: str, **options: int) -> EngineConfig:
        return EngineConfig(
            model=str(small_folder),
            attention_backend=backend,
            kernels="torch",
            device="cpu",
            max_model_len=64,
            page_size=7,
            **options,
        )

    return make


@pytest.fixture(scope="session")
def start(config_of: Callable[..., EngineConfig]) -> Callable[[str], Engine]:
    """A new engine on a backend, without graphs: the matrix refuses them on a CPU."""
    return lambda backend: start_engine(config_of(backend), PluginHost(candidates=candidates()))[0]


@pytest.fixture(params=["mutant-none", "mutant-none-written"], ids=["it writes", "the engine does"])
def backend(request: pytest.FixtureRequest) -> str:
    """A right backend that writes K and V itself, and one that leaves it to the engine."""
    name: str = request.param
    return name
