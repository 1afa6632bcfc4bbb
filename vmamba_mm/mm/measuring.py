"""Time and memory of a call, on a GPU and on a CPU."""

import contextlib
import ctypes
import statistics
import time
from pathlib import Path

import torch

WARM_UP = 5  # calls, on a GPU


def median_ms(function, spend=250, in_a_row=1):
    """The median ms of a call, over about ``spend`` ms of 3 to 50 times ``in_a_row`` calls."""
    function()
    times = []
    while len(times) < 3 or (sum(times) * in_a_row < spend and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / in_a_row)
    return statistics.median(times)


def median(function, on_gpu, spend=500):
    """ms of a warm call: the median of 3 to 50 of them, about ``spend`` ms in all."""
    for _ in range(WARM_UP if on_gpu else 1):
        function()
    if on_gpu:
        return median_ms(function, spend)
    times = []
    while len(times) < 3 or (sum(times) < spend and len(times) < 50):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def held_and_peak(function, on_gpu):
    """Bytes held before a call, and the most that are held during it.

    On a GPU what PyTorch has allocated. On a CPU the process's resident set, of which Linux keeps
    a high-water mark that can be reset; None elsewhere.
    """
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return held, torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or memory that is free and resident would hide a rise
    try:
        Path('/proc/self/clear_refs').write_text('5')
        held = _resident('VmRSS')
        function()
        return held, _resident('VmHWM')
    except (OSError, KeyError):
        return None


def _resident(name):
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(dict(line.split(':', 1) for line in lines)[name].split()[0]) * 1024


def cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return 'unknown CPU'
    return next((line.split(':', 1)[1].strip() for line in lines if 'model name' in line),
                'unknown CPU')
