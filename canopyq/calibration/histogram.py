"""Counting values in bounded memory, however many there are and however large they turn out to be."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2**14
CHUNK = 2**20  # values sorted into bins at a time: their indices stay in the processor's cache
SMALLEST = 2.0**-100  # a reach below it would divide beyond float32


class Histogram:
    """Counts in `BINS` equal bins over (−reach, reach).

    ``reach`` is a power of two and doubles when a value lies beyond it. Neighbouring bins are then added together, so
    that the counts are those of a histogram that had the final reach from the start: all factors are powers of two and
    round nothing, so order and batches do not matter. Values are known to within half a bin, at most 1/8192 of the
    largest one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.reach = 0.0

    def add(self, values: Tensor) -> None:
        """Count finite float values, any shape."""
        if not values.numel():
            return
        least, most = (float(end) for end in torch.aminmax(values))
        self._grow(max(-least, most, SMALLEST))
        for chunk in values.flatten().split(CHUNK):
            index = (chunk.float() * (BINS / 2 / self.reach)).floor_().int().add_(BINS // 2)
            self.counts += torch.bincount(index, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Count what another one counted."""
        if other.reach:
            self._grow(other.reach / 2)
            self.counts += other._regrouped(self.reach)

    def values(self) -> Tensor:
        """The middle of every bin, float32 (BINS,)."""
        index = torch.arange(BINS, device=self.counts.device)
        return (index + 0.5 - BINS / 2) * (self.reach / (BINS / 2))

    def _grow(self, largest: float) -> None:
        """Reach beyond ``largest``."""
        reach = 2.0 ** torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent.item()
        if reach > self.reach:
            self.counts, self.reach = self._regrouped(reach), reach

    def _regrouped(self, reach: float) -> Tensor:
        """The counts that a reach which is no smaller gives."""
        if reach == self.reach or not self.reach:
            return self.counts
        factor = min(round(reach / self.reach), 2 * BINS)  # by then all are in the two bins beside zero
        index = (torch.arange(BINS, device=self.counts.device) + (factor - 1) * BINS // 2) // factor
        return torch.zeros_like(self.counts).index_add_(0, index, self.counts)
