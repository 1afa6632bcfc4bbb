"""Launches with the addresses of those before, as one CUDA graph.

A model in a loop gets the same memory from torch's allocator each time, so that all that is
launched for a block is the same to the byte: then one call of the driver does for all of them.
"""

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch.cuda import is_current_stream_capturing

from vmamba_mm.ops.core import driver, torch_private

#: A graph is made when the same is launched for this time: before, libraries may still load what
#: they need, which a capture does not allow, and most sizes of a detector come once or twice.
WORTH_IT = 3
#: Lists of launches that are remembered; the one that was not used for longest is forgotten. A
#: graph takes 136 KiB of an H100.
MOST = 512
#: Graphs that are made in any case; each further one is earned by so many replays, which save about
#: what it costs. So memory that lies elsewhere each time cannot make a model slow.
FREE, EARNED_BY = 128, 8
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may do as they like

_lock = threading.Lock()


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """For captures alone: the default stream cannot be captured, nor one that others use."""
    stream = ctypes.c_void_p()
    driver.call('cuStreamCreate', ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
    return torch.cuda.ExternalStream(stream.value, device=index)


class Graph:
    """What ``launch`` launches on the current stream; it must neither allocate nor wait."""

    def __init__(self, index: int, launch: Callable[[], None]):
        graph, self._exec = ctypes.c_void_p(), ctypes.c_void_p()
        with _lock, driver.current(index):
            side = _side_stream(index)
            with torch.cuda.stream(side):
                stream = ctypes.c_void_p(side.cuda_stream)
                driver.call('cuStreamBeginCapture_v2', stream, _THREAD_LOCAL)
                try:
                    launch()
                finally:
                    driver.call('cuStreamEndCapture', stream, ctypes.byref(graph))
            try:
                driver.call('cuGraphInstantiateWithFlags', ctypes.byref(self._exec), graph,
                            ctypes.c_ulonglong(0))
            finally:
                driver.call('cuGraphDestroy', graph)
        self._index, self._launch = index, driver.library().cuGraphLaunch
        self._device, self._stream = torch_private.current_device, torch_private.current_stream
        weakref.finalize(self, driver.library().cuGraphExecDestroy, self._exec).atexit = False

    def __call__(self) -> None:
        stream = ctypes.c_void_p(self._stream(self._index))
        if self._device() != self._index or self._launch(self._exec, stream):
            with driver.current(self._index):  # in a new thread there is no context
                driver.call('cuGraphLaunch', self._exec, stream)


class _Seen:
    times, graph = 0, None


class _Balance:
    made = replayed = 0

    @classmethod
    def allows(cls) -> bool:
        return cls.made < FREE + cls.replayed // EARNED_BY


@functools.lru_cache(maxsize=MOST)
def _seen(index: int, key: Hashable) -> _Seen:
    return _Seen()


def replay(index: int, key: Hashable, launch: Callable[[], None]) -> None:
    """``launch()``, or the graph that was made of it; ``key`` decides all that it launches on that
    device: kernels, sizes, every address and number."""
    if is_current_stream_capturing():
        return launch()
    seen = _seen(index, key)
    if seen.graph is None:
        seen.times += 1
        if seen.times < WORTH_IT or not _Balance.allows():
            return launch()
        seen.graph = Graph(index, launch)
        _Balance.made += 1
    seen.graph()
    _Balance.replayed += 1
