"""The overhead and executor benchmarks print and write their rows."""

from __future__ import annotations

import json

import pytest

from wan_patches.bench import executor, overhead
from wan_patches.tables import text


@pytest.mark.slow
def test_rows_are_printed_and_written(tmp_path):
    rows = overhead.measure(repeats=1)
    assert len(rows) == 5
    assert all(row.seconds > 0 for row in rows[:3])
    overhead.write_json(tmp_path / "overhead.json", rows)
    written = json.loads((tmp_path / "overhead.json").read_text())
    assert [row["what"] for row in written["rows"]] == [row.what for row in rows]
    assert all(row.what in text(overhead.table(rows)) for row in rows)


@pytest.mark.slow
def test_executors_are_measured():
    small, theirs, cold, spare, build = executor.measure(repeats=1)
    assert 0 < small.seconds < 1
    assert 0 < theirs.seconds < 1
    assert 0 < build.seconds < spare.seconds
    assert cold.seconds > 0
