"""Timing on a GPU: calls in a CUDA graph, over buffers that together do not fit in its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 180e6  # three times the second-level cache of an H200


def rotations(bytes_read: int) -> int:
    """How many copies of what a call reads to take in turn."""
    return max(2, min(40, math.ceil(CACHE_BYTES / bytes_read)))


def graph_microseconds(calls: Sequence[Callable[[], object]], target_ms: float = 4.0, repeats: int = 11) -> float:
    """Median time of a call, over replays of a CUDA graph that holds all of them in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for call in calls[:2]:
            call()
        last.record()
        last.synchronize()
    rough_ms = max(first.elapsed_time(last) / 2, 0.002)
    count = max(len(calls), min(40, int(target_ms / rough_ms)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last) / count)
    return sorted(times)[len(times) // 2]
