"""Forms against the references of their ops: the measured forms and sizes, and the table."""

from __future__ import annotations

import json

import pytest
import torch

from wan_patches.bench import forms
from wan_patches.bench.forms import FAST, Row, Sample
from wan_patches.ops.dispatch import SMALL, op, ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_every_form_for_cpus_is_measured_from_its_minimum_size(dtype):
    rows = forms.measure(CPU, dtype, quick=True)
    measured = {row.op for row in rows if row.share is not None}
    on_cpu = {op.name for op in ops() if op.__module__.startswith("wan_patches.ops.") and op._forms_on("cpu")}
    without = {"tile blend", "cast norm"} if dtype == torch.float32 else {"tile blend"}  # nothing to cast
    close = {name for name in on_cpu if "in one pass" in name}  # they use the forms of exact ops
    assert measured >= on_cpu - without - close - {"preprocess"}
    assert all(row.exact for row in rows if row.share is not None)
    assert {row.reason for row in rows if row.op == "preprocess"} == {SMALL}


def test_a_slow_form_is_named_and_a_wrong_one_fails(tmp_path):
    @op("doubled")
    def doubled(x):
        return x + x

    @doubled.form("slowly", device="cpu", smallest=10)
    def slowly(x):
        for _ in range(100):
            y = x + x
        return y * 1.5

    def row(elements):
        sample = Sample(doubled, "", str(elements), lambda device, dtype: (torch.ones(elements),))
        return forms._row(sample, CPU, torch.float32, 0.01)

    few, many = row(9), row(10)
    assert few == Row("doubled", "", "9", "fp32", "", SMALL)
    assert (many.form, many.exact) == ("slowly", False)
    assert many.share > FAST
    forms.write_json(tmp_path / "rows.json", [few, many], CPU, threads=1)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["share"] for row in found["rows"]] == [None, many.share]
    assert found["machine"]["threads"] == 1


def test_the_table_names_slow_forms():
    from wan_patches.tables import text

    rows = [
        Row("norm", "rows", "1x2x3", "bf16", "chunks", "", 2.0, 1.0, True),
        Row("norm", "rows", "1x1x3", "bf16", "chunks", "", 2.0, 1.9, True),
        Row("norm", "rows", "1x1x1", "bf16", "", SMALL),
    ]
    shown = text(forms.table(rows))
    assert "0.50" in shown
    assert f"Above {FAST} of the reference: norm, rows, 1x1x3: 0.95" in shown
    assert "1x2x3: " not in shown
