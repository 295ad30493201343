"""The benchmark of transports: all deliver the same values; the table."""

from __future__ import annotations

import json

import psutil
import pytest

from wan_patches.bench import transport
from wan_patches.bench.measure import identical
from wan_patches.bench.transport import Case, Row
from wan_patches.tables import text

CASES = [
    Case("tensor", "tensor", (3, 50_000), "float32"),
    Case("tensors", "tensors", (10,), "float32", 3),
    Case("images", "images", (90, 60, 3), count=4),
    Case("frames", "frames", (90, 60, 3), count=4),
]


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_every_transport_delivers_every_value(tmp_path):
    chosen = [*transport.transports(), transport.Files(), transport.Wire()]
    rows = transport.measure(quick=True, seconds=0, cases_=CASES, transports_=chosen)
    assert [(row.case, row.transport) for row in rows] == [(case.name, each.name) for case in CASES for each in chosen]
    assert all(row.equal for row in rows)
    assert all(row.ms > 0 and row.memcpy_ms > 0 for row in rows)
    assert not any(psutil.pid_exists(pid) for each in chosen for pid in each.pids())
    transport.write_json(tmp_path / "rows.json", rows)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == len(rows)
    assert found["rows"][0]["times_memcpy"] == pytest.approx(rows[0].times_memcpy)
    assert found["machine"]["torch"]


def test_cases_know_their_number_of_bytes():
    for case in CASES:
        value = case.make()
        assert identical(value, case.make())
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        assert sum(part.nbytes if hasattr(part, "nbytes") else len(part.tobytes()) for part in parts) == case.nbytes
    full, quick = transport.cases(), transport.cases(quick=True)
    assert [case.kind for case in full] == [case.kind for case in quick]
    assert [case.nbytes >> 20 for case in full[:2]] == [854, 213]


def test_a_wrong_value_is_reported():
    class Wrong(transport.Transport):
        name = "wrong"

        def prepare(self, case):
            pass

        def fetch(self):
            return 5, 0.001

    (row,) = transport.measure(seconds=0, cases_=CASES[1:2], transports_=[Wrong()])
    assert not row.equal
    assert row.ms == pytest.approx(1)


def test_the_table_has_ratios_and_warnings():
    rows = [
        Row("video", 1, "ours", 2.0, 1.0, True, 0.1),
        Row("video", 1, "theirs", 20.0, 1.0, True, 0.1),
        Row("other", 1, "ours", 2.0, 1.0, True, 1.5),
        Row("other", 1, "theirs", 3.0, 1.0, False, 1.5),
    ]
    shown = text(transport.table(rows))
    assert "20.0 (10.0x)" in shown
    assert "~1.5x" in shown
    assert "up to 1.5 cores busy" in shown
    assert "Not what was sent: other through theirs" in shown
