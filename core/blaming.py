"""Says of an error in a plugin's code whose code it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import BackendError


@contextmanager
def blaming(backend: str, call: str, what_now: str = "") -> Iterator[None]:
    """Name the backend in whatever error its ``call`` raises.

    :param what_now: sentences behind it
    :raises BackendError: the call raised an error; it is the cause.
    :raises torch.OutOfMemoryError: the device's memory ran out, which is not the backend's fault.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = f"{backend} raised {type(error).__name__} in {call}(): {error}. {what_now}"
        raise BackendError(said.rstrip()) from error
