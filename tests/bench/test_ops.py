"""The benchmark of single operations: its rows, and its subjects."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from wan_patches.bench import measure, ops
from wan_patches.diagnostics import memory

CPU = torch.device("cpu")


def _case(op, stock, patched):
    return ops.Case(op, "1", lambda device, dtype: (stock, patched))


def test_rows_have_times_and_bit_equality():
    def slow():
        time.sleep(0.004)
        return torch.ones(3)

    def fast():
        return torch.ones(3)

    row, wrong = ops.measure(
        CPU, torch.float32, quick=True, cases=[_case("right", slow, fast), _case("wrong", fast, lambda: fast() + 1e-7)]
    )
    assert row.exact
    assert row.ratio > 2
    assert row.stock_ms >= 4
    assert row.dtype == "fp32"
    assert not wrong.exact


@pytest.mark.parametrize("case", [c for c in ops._cases(quick=True) if "rope" not in c.op or "tiny" in c.op])
def test_stock_and_patched_give_the_same_bits(case):
    with torch.no_grad():
        stock, patched = case.make(CPU, torch.bfloat16)
        assert measure.identical(stock(), patched())


def test_both_sides_are_diffusers_code_with_patches_off_and_on():
    stock, patched = ops._both(ops._wan_rope)
    assert "_wan_patches_rope" not in stock.__code__.co_names
    assert "_wan_patches_rope" in patched.__code__.co_names


def test_json_has_rows_and_facts_and_no_paths(tmp_path):
    rows = ops.measure(CPU, torch.bfloat16, quick=True, cases=[ops._rope((1, 64, 2, 32))])
    ops.write_json(tmp_path / "rows.json", rows, CPU, threads=1)
    text = (tmp_path / "rows.json").read_text()
    found = json.loads(text)
    assert found["machine"].keys() >= {"cpu", "threads", "device", "torch", "diffusers", "pillow"}
    assert found["rows"][0].keys() == {
        "op", "shape", "dtype", "stock_ms", "patched_ms", "ratio", "stock_extra_mib", "patched_extra_mib", "exact",
        "other_cores", "low", "high", "cpu_ratio",
    }  # fmt: skip
    assert math.isclose(found["rows"][0]["ratio"], found["rows"][0]["stock_ms"] / found["rows"][0]["patched_ms"])
    assert found["machine"]["threads"] == 1
    assert "/" not in text


def test_threads_apply_to_the_measurement_only():
    before, seen = torch.get_num_threads(), []
    ops.measure(
        CPU,
        torch.float32,
        quick=True,
        threads=1,
        cases=[_case("x", lambda: seen.append(torch.get_num_threads()), lambda: None)],
    )
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_includes_the_memory_of_a_call(sampled, monkeypatch):
    if sampled:  # as on systems without the file
        monkeypatch.setattr(memory, "_proc_status", lambda field: {}[field])

    def call():
        block = torch.ones(1 << 24)  # 64 MiB
        time.sleep(0.01)
        del block

    assert 60 << 20 < measure.peak_extra_bytes(call, CPU) < 80 << 20
    assert measure.peak_extra_bytes(lambda: None, CPU) < 4 << 20


def test_calls_are_taken_in_turns():
    order = []
    calls = {"stock": lambda: order.append("s"), "patched": lambda: order.append("p")}
    measure.in_turns(calls, CPU, seconds=0.0, sample=0.0)
    assert order.count("p") == 3
    assert order.count("s") == 3


def test_waiting_takes_time_but_no_cpu_time():
    def work():
        start = time.process_time()
        while time.process_time() - start < 0.02:
            pass

    turns = measure.in_turns({"work": work, "wait": lambda: time.sleep(0.06)}, CPU, seconds=0.0)
    assert turns.seconds["wait"] >= 0.06
    assert turns.cpu_seconds("work") >= 0.02 > turns.cpu_seconds("wait")
    low, high = turns.spread("wait", "work")
    ratios = sorted(a / b for a, b in zip(turns.samples["wait"], turns.samples["work"]))
    assert ratios[0] <= low <= ratios[1] <= high <= ratios[2]


def test_turns_that_do_not_agree_give_no_verdict():
    from wan_patches.tables import text

    row = ops.Row("noisy", "3", "bf16", 1.0, 1.1, None, None, True, low=0.8, high=1.1, cpu_ratio=1.02)
    assert row.is_slower is None
    assert replace(row, high=0.95).is_slower
    assert replace(row, patched_ms=1.0).is_slower is False
    shown = " ".join(text(ops.table([row])).split())
    assert "Slower than stock" not in shown
    assert "The turns do not agree, run again: noisy 3, 0.91x" in shown
    assert "0.80-1.10 1.02x" in shown


def test_the_table_names_slower_rows_and_a_busy_machine():
    from wan_patches.tables import text

    rows = [
        ops.Row("fine", "1", "bf16", 2.0, 1.0, 1.0, None, True),
        ops.Row("slow", "2", "bf16", 1.0, 2.0, None, None, True, other_cores=1.5),
    ]
    shown = text(ops.table(rows))
    assert "Slower than stock: slow 2, 0.50x" in shown
    assert "Slower than stock: fine" not in shown
    assert "~ in 1 of 2 rows: other processes kept up to 1.5 cores busy" in shown
