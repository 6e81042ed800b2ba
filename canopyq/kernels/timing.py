"""Timing: on a GPU, graphs of many calls over more weights than its cache holds; on a CPU, rounds in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

CACHE = 180e6  # bytes that rotating weights take together: three times an H200's L2 cache


def rotations(weight_bytes: int) -> int:
    """How many copies of a weight no cache holds together."""
    return max(2, min(40, math.ceil(CACHE / weight_bytes)))


def microseconds(calls: Sequence[Callable[[], object]], milliseconds: float = 2.0, repeats: int = 9) -> float:
    """Median time of one call, from replays of a CUDA graph that holds calls in turn for about ``milliseconds``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        rough = max(_elapsed(lambda: (calls[0](), calls[1]())) / 2, 5.0)
    count = min(40, max(2, int(milliseconds * 1e3 / rough), len(calls) if rough < 1000 else 2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    return statistics.median(_elapsed(graph.replay) for _ in range(repeats)) / count


def _elapsed(run: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def rounds(calls: Sequence[Callable[[], object]], seconds: float = 0.3) -> list[float]:
    """Median microseconds of each call on a CPU. They are called in turn, so that other work slows all alike."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [1e6 * statistics.median(taken) for taken in times]
