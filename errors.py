"""The errors Isobit raises. A user's mistake is always a ``ValueError``.

A message says what was wanted, what was given, and the remedy.
"""

from __future__ import annotations


class IsobitError(Exception):
    """Base of every error that Isobit raises on purpose."""


class ConfigError(IsobitError, ValueError):
    """A parameter, a model folder or a combination of options that cannot be served."""


class UnknownParameterError(ConfigError, TypeError):
    """A parameter name that does not exist."""


class RequestError(IsobitError, ValueError):
    """A request that can never be served: bad token ids, too long, bad parameters."""


class LogitsProcessorError(RequestError):
    """A request's own logits processor failed; that request alone has ended.

    ``request_id`` is the request's, ``processor`` the function's name.
    """

    def __init__(self, processor: str, problem: str, request_id: str = "") -> None:
        super().__init__(processor, problem, request_id)
        self.processor = processor
        self.problem = problem
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            f"logits processor {self.processor} of request {self.request_id!r} {self.problem} "
            "Wanted: a function of (token ids so far, logits [V]) that returns fp32 logits [V]."
        )


class SelfCheckError(IsobitError, RuntimeError):
    """No available kernel kept its contract on this machine; the engine refuses to start."""


class EngineError(IsobitError, RuntimeError):
    """The engine's own state is inconsistent; always a bug, or a plugin's."""


class BackendError(EngineError):
    """An attention backend raised an error in a step; the engine can be used again."""


class DeviceMemoryError(EngineError):
    """A GPU's memory ran out in a step; the engine can be used again."""
