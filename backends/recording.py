"""Recording work on a device and replaying it: a CUDA graph, and on the CPU a tape.

The tape keeps the rules of a CUDA graph: every call goes again to the same tensors, whatever the
host computed is frozen as it was, and nothing may wait for a value or size a tensor by one. So what
is written in torch can be judged for ``cuda_graph`` on a machine without a GPU.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import BackendError

_WAITS = {
    "aten::_local_scalar_dense",
    "aten::allclose",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::narrow.Tensor",
}
_SIZED_BY_VALUES = {
    "aten::_unique",
    "aten::_unique2",
    "aten::argwhere",
    "aten::bincount",
    "aten::combinations",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::tensor_split.tensor_indices_or_sections",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
    "aten::where",
}
_REPEATS = {"aten::repeat_interleave.Tensor", "aten::repeat_interleave.self_Tensor"}
_INDEXED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_"}
_MASKS = (torch.bool, torch.uint8)


class Recorded(Protocol):
    """A recording that can be replayed."""

    def replay(self) -> None: ...


class _Piece(Recorded, Protocol):
    def begin(self) -> None: ...

    def end(self) -> None: ...


class Recording:
    """Work that is being recorded; ``pieces`` has what was recorded up to the last cut."""

    def __init__(self, new_piece: Callable[[], _Piece]) -> None:
        self.pieces: list[Recorded] = []
        self._new_piece = new_piece

    def cut(self) -> None:
        """End a piece and begin the next; a tensor of the one may be used in the other."""
        self._end()
        self._begin()

    def __enter__(self) -> Recording:
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _begin(self) -> None:
        self._piece = self._new_piece()
        self._piece.begin()

    def _end(self) -> None:
        self._piece.end()
        self.pieces.append(self._piece)


def warm_up(work: Callable[[], None], device: torch.device) -> None:
    """Run ``work`` as a capture will find it: on a CUDA device beside the current stream."""
    if device.type != "cuda":
        work()
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(device).wait_stream(side)


def memory_pool(device: torch.device) -> Any:
    """Memory that several recordings may share, as only one is replayed at a time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def record(work: Callable[[], None], device: torch.device, pool: Any = None) -> Recorded:
    """Record ``work`` in one piece; as ``recording``."""
    with recording(device, pool) as found:
        work()
    return found.pieces[0]


@contextmanager
def recording(device: torch.device, pool: Any = None) -> Iterator[Recording]:
    """Record the block's work, which has run before on the same tensors.

    :param pool: from ``memory_pool``; None takes memory for this recording alone.
    :raises BackendError: it waits for the device, or sizes a tensor by values.
    :raises torch.OutOfMemoryError: the device's memory ran out.
    """
    if device.type != "cuda":
        with Recording(_Tape) as found:
            yield found
        return
    shared = memory_pool(device) if pool is None else pool
    with _capturing(device), Recording(lambda: _Graph(shared)) as found:
        yield found


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: a pool's memory is reused only on the stream that it was taken on."""
    return _new_stream(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _new_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _capturing(device: torch.device) -> Iterator[None]:
    torch.cuda.empty_cache()  # during a capture the allocator cannot give its stock back
    state = torch.cuda.get_rng_state()
    outer = sys.exception()
    collecting = gc.isenabled()
    gc.disable()  # an older graph that is collected during a capture would end it
    try:
        with torch.cuda.stream(_side_stream(device)):
            yield
    except Exception as error:
        # A capture that fails leaves torch's generator in the middle of it: give it a new state.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        torch.cuda.set_rng_state(state)
        cause = _first_cause(error, outer)
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        first_line = str(cause).partition("\n")[0]
        raise BackendError(
            f"the work cannot be captured: {type(cause).__name__}: {first_line}"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _first_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """What went wrong first: the end of a broken capture raises once more.

    :param outer: what the caller was handling before, which is no part of it
    """
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return error


class _Graph:
    """A CUDA graph of what the current stream is given."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def begin(self) -> None:
        self._graph.capture_begin(pool=self._pool)

    def end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator call, with the tensors it had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def begin(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().removesuffix(".out").removesuffix("_out")  # "aten::name.overload"
        if name in _WAITS:
            raise BackendError(f"{name} waits for the device, which a captured graph cannot do")
        if _sized_by_values(name, args, kwargs):
            raise BackendError(f"{name} sizes a tensor by values; a captured graph cannot do that")
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _sized_by_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call's result, or what it computes on the way, has as many rows as values say."""
    if name in _REPEATS:
        return kwargs.get("output_size") is None
    if name not in _INDEXED:
        return name in _SIZED_BY_VALUES
    indices = [index for index in args[1] if index is not None]
    if not any(index.dtype in _MASKS for index in indices):
        return False
    # A number of the host's (it has no axis) where a single mask says so is a masked fill.
    return name == "aten::index.Tensor" or args[2].dim() > 0 or len(indices) > 1
