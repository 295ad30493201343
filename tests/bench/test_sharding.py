"""The benchmark of divided weights: all variants compute the same; the table."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import torch

from wan_patches.bench import sharding
from wan_patches.bench.measure import MeasurementError
from wan_patches.bench.sharding import Row
from wan_patches.tables import text

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_variant_gives_the_same_bits_and_its_memory(tmp_path):
    processes = set(psutil.Process().children(recursive=True))
    rows = sharding.measure(CPU, torch.bfloat16, quick=True, folder=tmp_path)
    assert [(row.way, row.ranks) for row in rows] == [
        ("whole", 1),
        ("divided after loading", 2),
        ("divided on load", 2),
    ]
    assert all(row.exact for row in rows)
    assert len({row.weights_mib for row in rows}) == 1
    assert all(0 < row.block_mib < row.weights_mib for row in rows)
    whole, after, early = rows
    assert early.load_mib < after.load_mib  # type: ignore[operator]
    assert early.held_mib < whole.held_mib
    assert [*tmp_path.iterdir()] == []
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ
    left = {
        child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in str(child.cmdline())
    }
    assert left <= processes

    sharding.write_json(tmp_path / "rows.json", rows, CPU)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["load_ratio"] for row in found["rows"]] == [row.load_ratio for row in rows]
    assert found["machine"]["torch"]


def test_a_failing_rank_is_reported_with_its_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"'whole' has failed: Traceback(.|\n)*no such folder"):
        sharding._run("whole", 1, CPU, torch.bfloat16, tmp_path / "no such folder")


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [(CPU, 1, "2 ranks or more, not 1"), (torch.device("cuda"), 64, "devices of the kind 'cuda', and 64 ranks")],
)
def test_impossible_measurements_are_reported(device, ranks, message):
    with pytest.raises(MeasurementError, match=message):
        sharding.measure(device, torch.bfloat16, ranks=ranks, quick=True)


def test_the_table_has_ratios_and_marks_missing_counters():
    rows = [
        Row("whole", 1, "bfloat16", 1000.0, 80.0, 3000.0, 1000.0, 1010.0, None, True),
        Row("divided on load", 2, "bfloat16", 1000.0, 80.0, None, 500.0, 750.0, None, False),
    ]
    shown = text(sharding.table(rows))
    assert "3,000" in shown
    assert "3.00x" in shown
    assert "0.75x" in shown
    assert "NO" in shown
    assert "A block has 80 MiB" in shown
    assert "host" not in shown
    accelerator = Row("divided on load", 2, "bfloat16", 1000.0, 80.0, 510.0, 500.0, 750.0, 120.0, True)
    assert "host" in text(sharding.table([accelerator]))
