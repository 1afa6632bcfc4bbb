"""Launches with the addresses of those before, as one CUDA graph.

A model in a loop gets the same memory from torch's allocator each time, so that all that is
launched for a block is the same to the byte: then one call of the driver does for all of them.

How this works: :func:`replay` remembers by its key, in which every address and number is, how often
the same was launched on a device. The third time the launches are captured, on a stream of their
own, into a CUDA graph; by the driver, as torch's graphs take memory for themselves. From then on
the graph is launched on the current stream. Whatever differs has another key. During somebody
else's capture, and with ``VMAMBA_MM_GRAPHS=0`` in the environment, all is launched as it is: try
that first where a result is wrong in a loop only.

How to test a change: ``tests/ops/test_graphs.py``, without a GPU for what decides, and on a GPU,
where results must be the same to the bit with and without graphs, for new numbers in the same
memory.
"""

import ctypes
import functools
import os
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
#: Graphs that are made in any case; each further one is made after so many replays, which save
#: about what it costs. So memory that lies elsewhere each time cannot make a model slow.
FREE, REPLAYS_PER_GRAPH = 128, 8
#: ``VMAMBA_MM_GRAPHS=0`` in the environment turns all of this off.
ENABLED = os.environ.get('VMAMBA_MM_GRAPHS', '1') != '0'
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may do as they like

_lock = threading.Lock()


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """A stream for captures alone: neither the default stream nor one in use can be captured."""
    stream = ctypes.c_void_p()
    driver.call('cuStreamCreate', ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
    return torch.cuda.ExternalStream(stream.value, device=index)


class Graph:
    """A CUDA graph of what ``launch`` launches; it must neither allocate nor wait."""

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


class _History:
    """Counts how often the same was launched, and holds its graph."""
    launches, graph = 0, None


class _Totals:
    """Counts the graphs made and replayed, of all keys."""
    made = replayed = 0

    @classmethod
    def allow_another(cls) -> bool:
        return cls.made < FREE + cls.replayed // REPLAYS_PER_GRAPH


@functools.lru_cache(maxsize=MOST)
def _history(index: int, key: Hashable) -> _History:
    return _History()


def clear() -> None:
    """Forget all launches and graphs."""
    _history.cache_clear()
    _Totals.made = _Totals.replayed = 0


def replay(index: int, key: Hashable, launch: Callable[[], None]) -> None:
    """``launch()``, or the graph that was made of it; ``key`` decides all that it launches on that
    device: kernels, sizes, every address and number."""
    if not ENABLED or is_current_stream_capturing():
        return launch()
    history = _history(index, key)
    if history.graph is None:
        history.launches += 1
        if history.launches < WORTH_IT or not _Totals.allow_another():
            return launch()
        history.graph = Graph(index, launch)
        _Totals.made += 1
    history.graph()
    _Totals.replayed += 1
