"""Linear layers of one input that servers compute as one: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Iterable

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each of ``names`` -> those of them that are computed in one with it, itself included."""
    together: dict[tuple[str, tuple[str, ...] | str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        together.setdefault((parent, next((part for part in FUSED if leaf in part), leaf)), []).append(name)
    return {name: tuple(alike) for alike in together.values() for name in alike}
