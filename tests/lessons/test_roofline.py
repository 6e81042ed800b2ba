"""Bytes, operations, and the longer of their times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import linear
from canopyq.lessons.roofline import H200, Machine, crossover, linear_work

sizes = st.integers(64, 30_000)


def test_a_layer_by_hand() -> None:
    work = linear_work(rows=2, inputs=4, outputs=8, bits=16)
    assert work.nbytes == 4 * 8 * 2 + 2 * 4 * 2 + 2 * 8 * 2  # weights, inputs, outputs
    assert work.operations == 2 * 2 * 4 * 8
    assert work.intensity == 128 / 112


@given(st.integers(1, 5000), sizes, sizes, st.sampled_from([4.125, 8.0, 16.0]))
def test_the_time_is_the_longer_one(rows: int, inputs: int, outputs: int, bits: float) -> None:
    work = linear_work(rows, inputs, outputs, bits)
    moving, counting = work.nbytes / H200.bytes_per_s, work.operations / H200.operations_per_s
    assert work.seconds(H200) == max(moving, counting)
    assert work.limit(H200) == ("memory" if moving > counting else "arithmetic")


@given(sizes, sizes, st.sampled_from([4.125, 8.0, 16.0]))
def test_the_crossover_is_where_both_times_are_equal(inputs: int, outputs: int, bits: float) -> None:
    machine = Machine("any", 1e12, 50e12)
    rows = crossover(inputs, outputs, bits, machine)
    if rows == float("inf"):
        assert linear_work(10**9, inputs, outputs, bits).limit(machine) == "memory"
    else:
        work = linear_work(1, inputs, outputs, bits)
        nbytes = inputs * outputs * bits / 8 + rows * (work.nbytes - inputs * outputs * bits / 8)
        assert nbytes / machine.bytes_per_s == pytest.approx(rows * work.operations / machine.operations_per_s)


def test_the_benchmark_of_layers_takes_the_same_rates() -> None:
    assert (linear.READ, linear.MULTIPLY) == (H200.bytes_per_s, H200.operations_per_s)
