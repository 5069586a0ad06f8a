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


class SelfCheckError(IsobitError, RuntimeError):
    """No available kernel kept its contract on this machine; the engine refuses to start."""


class EngineError(IsobitError, RuntimeError):
    """The engine's own state is inconsistent; always a bug, or a plugin's."""
