"""The benchmark of a shared VAE, on small cases."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from wan_patches.bench.measure import MeasurementError
from wan_patches.bench.vae_parallel import Case, cases, measure

SMALL = {"frames": 1, "height": 48, "width": 64, "tile": 32, "stride": 24, "base_dim": 4}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one core")
def test_rows_have_the_bits_of_one_process():
    wanted = [Case("decode", **SMALL), Case("encode", **SMALL, dtype="bf16")]
    rows = measure(rounds=2, cases_=wanted)
    assert [row.case for row in rows] == wanted
    assert all(row.equal and row.ranks == 2 and row.alone_s > 0 and row.ratio > 0 for row in rows)
    assert not multiprocessing.active_children()


def test_impossible_measurements_are_reported():
    with pytest.raises(MeasurementError, match="999 processes need a core each"):
        measure(ranks=999)
    with pytest.raises(MeasurementError, match="Unknown dtype 'fp8'"):
        measure(ranks=1, cases_=[Case("decode", dtype="fp8")])


def test_quick_is_smaller():
    assert [case.frames for case in cases(quick=True)] == [1, 1]
    assert [case.operation for case in cases()] == ["decode", "encode"]
