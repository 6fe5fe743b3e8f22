"""What a computation takes: its floating-point operations, memory and time, told by running it once. No estimate by size of the model
alone would hold for convolutions, attention and vocabularies alike."""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOM = 2 * 2**30  # bytes that rows side by side may take; the same on every machine, for the same rounding
# Seconds below which a computation is timed by a second run, without the counting and with everything warm; and by three, of which the shortest
# counts: on a busy machine others take its caches away.
QUICK, SHORT = 5.0, 0.2


@dataclass(frozen=True)
class Work:
    """operations  floating-point, of products and convolutions
    bytes       of the tensors that were made and held at one time, at most
    seconds     of CPU time; on another device, of a clock
    """

    operations: float
    bytes: int
    seconds: float


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that is made inside, until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what was there before is not counted, nor its views
            self._seen(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._seen(tensor, None)
        return result

    def _seen(self, tensor: Any, size: int | None) -> None:
        if not isinstance(tensor, Tensor) or tensor.is_sparse:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if size is None else size
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _NoModules:
    """In place of torch's record of which module runs, whose hooks fail in gradients of parametrised layers (spectral or weight norm)."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def work_of(function: Callable[[], Any], device: torch.device | None = None) -> Work:
    """What one call of a function takes."""
    clock = time.process_time if device is None or device.type == "cpu" else time.perf_counter
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter as operations, _Live() as live:
        began = clock()
        function()
        seconds = clock() - began
    if seconds < QUICK:
        times = list[float]()
        while not times or (seconds < SHORT and len(times) < 3):
            began = clock()
            function()
            times.append(clock() - began)
        seconds = min(times)
    return Work(float(operations.get_total_flops()), live.most, seconds)


def side_by_side(function: Callable[[], Any], wanted: int) -> int:
    """How many such computations to hold at a time, at least one and at most those wanted, so that they fit into `ROOM`."""
    if wanted <= 1:
        return 1
    return max(1, min(wanted, ROOM // max(work_of(function).bytes, 1)))
