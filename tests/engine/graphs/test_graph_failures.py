"""What cannot be captured stops the start with a line that names who is at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from isobit.backends import recording
from isobit.core import startup
from isobit.core.config import EngineConfig
from isobit.core.engine import Engine
from isobit.core.startup import start_engine
from isobit.errors import BackendError, ConfigError
from isobit.plugins.conformance.mutants.catalogue import candidates
from isobit.plugins.manager import PluginHost

Made = Callable[..., tuple[EngineConfig, Engine]]
pytestmark = pytest.mark.usefixtures("one_thread")


def fail(*args: Any) -> None:
    raise ValueError("no room")


@pytest.fixture
def made(config_of: Callable[..., EngineConfig]) -> Made:
    """The options of an engine on a backend and the engine itself, not captured yet."""

    def make(backend: str = "mutant-none") -> tuple[EngineConfig, Engine]:
        config = config_of(backend, cuda_graph_max_bs=1)
        return config, start_engine(config, PluginHost(candidates=candidates()))[0]

    return make


@pytest.mark.parametrize("call", ["capture", "plan"])
def test_a_backend_that_raises_at_capture_is_named(made: Made, call: str) -> None:
    config, engine = made()
    setattr(engine.runner.backend, call, fail)
    message = (
        rf"backend 'mutant-none' cannot be made: RightAttention raised ValueError in {call}\(\): "
        r"no room\. Pass cuda_graph=False, or another attention_backend\.$"
    )
    with pytest.raises(ConfigError, match=message):
        startup._capture(config, engine.runner, 16)


def test_a_backend_that_captures_nothing_is_named(made: Made) -> None:
    config, engine = made("mutant-no-capture")
    with pytest.raises(ConfigError, match=r"NoCapture raised NotImplementedError in capture\(\)"):
        startup._capture(config, engine.runner, 16)


def test_memory_that_runs_out_is_not_the_backends_fault(made: Made) -> None:
    config, engine = made()
    engine.runner.backend.capture = MagicMock(side_effect=torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        startup._capture(config, engine.runner, 16)


def test_a_model_that_cannot_be_captured_in_pieces_is_named(made: Made) -> None:
    config, engine = made()
    runner, model = engine.runner, engine.runner.model

    def waits(*inputs: Any) -> torch.Tensor:
        hidden = model(*inputs)
        if len(hidden) > 1:
            hidden.sum().item()
        return hidden

    runner.model = waits
    message = (
        rf"model '{re.escape(config.model)}' cannot be captured in pieces .* waits for the "
        r"device, which a captured graph cannot do\. Pass cuda_graph_max_tokens=0, or "
        r"cuda_graph=False\.$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        startup._capture(config, runner, 16)
    assert "attention backend" not in str(caught.value)
    startup._capture(config, runner, 0)  # as the message says


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The block of a capture, on a pretended GPU."""
    pretended = MagicMock(OutOfMemoryError=torch.OutOfMemoryError)
    monkeypatch.setattr(recording, "torch", pretended)
    return lambda: recording._capturing(torch.device("cuda", 0))


def capture(capturing: Any, error: Exception) -> None:
    """A capture that fails, and whose end raises once more."""
    with capturing():
        try:
            raise error
        finally:
            raise RuntimeError("the capture ended early")


def test_an_earlier_shortage_is_not_the_cause_of_a_failed_capture(capturing: Any) -> None:
    message = "cannot be captured: ValueError: it waits"
    with pytest.raises(BackendError, match=message):
        capture(capturing, ValueError("it waits"))
    try:
        raise torch.OutOfMemoryError("an hour ago")
    except torch.OutOfMemoryError:
        with pytest.raises(BackendError, match=message):
            capture(capturing, ValueError("it waits"))


def test_a_shortage_within_a_capture_is_its_cause(capturing: Any) -> None:
    """The negative control."""
    with pytest.raises(torch.OutOfMemoryError, match="now"):
        capture(capturing, torch.OutOfMemoryError("now"))
