"""Work in every variant: separate patches and graphs for each variant, and correct numbers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo

import wan_patches
from wan_patches.bench import measure, shapes, variants
from wan_patches.tables import text

CPU = torch.device("cpu")
TINY = shapes.SHAPES["tiny"]

pytestmark = pytest.mark.usefixtures("one_thread")


def _chosen():
    choice = wan_patches._registry.chosen()
    return None if choice is None else (choice.names, choice.fidelity.value)


def _measured(make, compiled=False, modules=()):
    return variants.measure(
        "block", TINY, variants.Subject(make, modules), CPU, torch.float32, compiled=compiled, seconds=0.0
    )


def _result(**changes):
    rows = (
        variants.Row("stock", ms=100.0, peak_mib=50.0, exact=True, difference=0.0),
        variants.Row("patched", ms=80.0, peak_mib=40.0, exact=True, difference=0.0),
        variants.Row("patched, close", reason="no active patch changes rounding"),
        variants.Row("compiled stock", ms=70.0, peak_mib=45.0, exact=False, difference=0.25),
        variants.Row("compiled patched", ms=75.0, peak_mib=45.0, exact=False, difference=0.25),
    )
    made = {
        **{"bench": "model", "shape": "14b-480p", "dtype": "bf16", "video": (21, 60, 104), "tokens": 32760},
        **{"layers": 40, "of_layers": 40, "rows": rows, "floor_ms": 60.0, "matmuls": 406, "attentions": 80},
        **{"copy_gb_s": 4000.0, "deterministic": True, "patches": ("rope",)},
    }
    return variants.Result(**{**made, **changes})


# Turns


def test_every_call_runs_in_its_own_context_and_none_is_always_first():
    order, inside = [], []

    @contextlib.contextmanager
    def around(name):
        inside.append(name)
        yield
        inside.pop()

    def call(name):
        assert inside == ([] if name == "c" else [name])
        order.append(name)

    names = ("a", "b", "c")
    measure.in_turns(
        {name: lambda name=name: call(name) for name in names},
        CPU,
        around={name: lambda name=name: around(name) for name in ("a", "b")},
        seconds=0.0,
        sample=0.0,
    )
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # the first call of each is long enough to count


def test_short_calls_are_repeated_in_a_sample_and_medians_are_per_call(monkeypatch):
    counts = Counter()

    def took(call, device, times):  # a clock that does not depend on the load of the machine
        for _ in range(times):
            call()
        seconds = {"short": 0.001, "long": 0.02 + 0.001 * counts["long"]}[call.__name__]
        return seconds, 2 * seconds

    def short():
        counts["short"] += 1

    def long():
        counts["long"] += 1

    monkeypatch.setattr(measure, "_time", took)
    found = measure.in_turns({"short": short, "long": long}, CPU, seconds=0.0, sample=0.01)
    assert counts == {"short": 1 + 3 * 10, "long": 3}
    assert found.seconds == {"short": 0.001, "long": 0.022}
    assert found.cpu_seconds("long") == 0.044
    counts.clear()
    measure.in_turns({"short": short, "long": long}, CPU, seconds=0.2, sample=0.01)
    assert counts == {"short": 1 + 6 * 10, "long": 6}


# Variants


def test_each_variant_is_made_and_called_with_its_own_patches():
    made, seen = [], []

    def make():
        mine = _chosen()
        made.append(mine)

        def call():
            assert _chosen() == mine
            seen.append(mine)
            return torch.ones(2)

        return call

    before = _chosen()
    result = _measured(make)
    assert made == [(frozenset(), "exact"), (None, "exact"), (None, "close")][: len(made)]
    assert len(made) >= 2
    assert Counter(seen)[made[0]] > 3
    assert _chosen() == before
    assert [row.way for row in result.rows] == ["stock", "patched", "patched, close"]
    assert result.row("patched").exact is True


def test_a_failing_variant_gets_a_reason_and_failing_stock_raises():
    def make(wrong):
        def call():
            if (_chosen()[0] is None) == wrong:
                raise RuntimeError("no such luck\nat all")
            return torch.ones(2)

        return lambda: call

    result = _measured(make(True))
    assert result.row("patched") == variants.Row("patched", reason="RuntimeError: no such luck")
    assert result.row("stock").ms > 0
    assert result.of("patched") is result.moved_gb("patched") is None
    assert "patched: RuntimeError: no such luck" in text(variants.table(result))
    with pytest.raises(measure.MeasurementError, match=r"Stock's own code does not run: RuntimeError: no such luck\."):
        _measured(make(False))


def test_different_bits_are_detected():
    def make():
        out = torch.ones(2) if _chosen()[0] is not None else torch.tensor([1.0, 1.25])
        return lambda: out

    result = _measured(make)
    assert result.row("patched").exact is False
    assert result.row("patched").difference == 0.25
    assert result.different() == ["patched"]
    assert result.deterministic


def test_bits_are_not_compared_if_stock_is_nondeterministic():
    result = _measured(lambda: lambda: torch.rand(2))
    assert not result.deterministic
    assert result.row("patched").exact is None
    assert result.different() == []
    assert "no comparison of bits means anything" in text(variants.table(result))


def test_memory_is_the_peak_of_a_call():
    size = 64 << 20

    def make():
        extra = size if _chosen()[0] is None else 0
        return lambda: torch.ones(size // 4 + extra // 4).sum()

    result = _measured(make)
    assert 55 < result.row("stock").peak_mib < 80
    assert 1.7 < result.memory_of("patched") < 2.2


def test_skipped_code_is_logged_once(caplog):
    logger = logging.getLogger("wan_patches")
    with caplog.at_level("WARNING"), variants.said_once():
        for word in ("rope", "vae", "rope"):
            logger.warning("left stock code alone: %s", word)
    logger.warning("left stock code alone: %s", "rope")
    assert [record.getMessage()[-4:] for record in caplog.records] == ["rope", " vae", "rope"]


# Compilers


class _Backend:
    """Records the calls in every graph, and runs the graph unchanged."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        nodes = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
        self.graphs.append(Counter(getattr(n.target, "__name__", str(n.target)) for n in nodes))
        return graph.forward


class _Linear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.fixture
def backend(monkeypatch):
    torch._dynamo.reset()
    backend = _Backend()
    monkeypatch.setattr(variants, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_variants_keep_their_own_graphs(backend, whole):
    model = shapes.build(TINY, CPU, torch.float32)
    arguments = shapes.inputs(TINY, model, CPU, torch.float32)
    used = Counter()

    def make():
        def call():
            used[_chosen(), model._compiled_call_impl is not None] += 1
            return model(**arguments)[0]

        return call

    result = _measured(make, compiled=True, modules=[model] if whole else list(model.blocks))
    assert len(backend.graphs) == 2  # equal blocks share one
    stock, patched = backend.graphs
    assert stock["setitem"] > 0
    assert stock["stack"] == patched["setitem"] == 0
    assert patched["stack"] > 0
    assert [row.way for row in result.rows] == list(variants.WAYS)
    assert not any(row.reason for row in result.rows if row.way != "patched, close")
    assert all(row.exact for row in result.rows if row.ms)  # nothing was fused
    assert all(module._compiled_call_impl is None for module in model.modules())
    if whole:
        assert used[(frozenset(), "exact"), True] >= 5 <= used[(None, "exact"), True]


def test_graphs_with_different_inlined_code_are_not_mixed_up(backend):
    class Inner(torch.nn.Module):
        def forward(self, x):
            return x + 1

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x) * 2

    outer, codes = Outer(), [Inner.forward.__code__, (lambda self, x: x + 3).__code__]
    handles = [variants._Handle([outer]) for _ in codes]
    for _ in range(3):
        for handle, code, expected in zip(handles, codes, (2, 6)):
            Inner.forward.__code__ = code
            with handle.in_use():
                assert outer(torch.zeros(2)).tolist() == [expected, expected]
    assert [handle.graphs for handle in handles] == [1, 1]


@pytest.mark.slow
def test_a_failing_compiler_is_recorded_as_the_reason(monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("not on this machine")

    torch._dynamo.reset()
    monkeypatch.setattr(variants, "BACKEND", broken)
    linear = _Linear(2, 2)
    result = _measured(lambda: lambda: linear(torch.ones(2)), compiled=True, modules=[linear])
    assert "not on this machine" in result.row("compiled stock").reason
    assert result.row("compiled stock").ms is None
    assert result.row("patched").exact


def test_uncompiled_modules_are_not_presented_as_compiled(backend):
    linear = torch.nn.Linear(2, 2)  # dynamo skips torch's own modules
    result = _measured(lambda: lambda: linear(torch.ones(2)), compiled=True, modules=[linear])
    assert result.row("compiled stock").reason == "nothing was compiled"


@pytest.mark.slow
def test_late_graphs_are_detected(backend):
    linear = _Linear(2, 2)
    sizes = iter([2, 2, 3, 4, 5, 6, 7] + [7] * 10000)

    def make():
        return lambda: linear(torch.ones(next(sizes) if linear._compiled_call_impl else 2, 2))[:2]

    torch._dynamo.config.automatic_dynamic_shapes, before = False, torch._dynamo.config.automatic_dynamic_shapes
    try:
        result = _measured(make, compiled=True, modules=[linear])
    finally:
        torch._dynamo.config.automatic_dynamic_shapes = before
    assert any("recompiled" in result.row(way).reason for way in ("compiled stock", "compiled patched"))


# Numbers


def test_ratios_and_gigabytes():
    result = _result()
    assert result.of("patched") == 0.8
    assert result.of("compiled patched", "compiled stock") == 75 / 70
    assert math.isclose(result.of_floor("patched"), 80 / 60)
    assert result.memory_of("patched") == 0.8
    assert math.isclose(result.moved_gb("patched"), 0.02 * 4000)
    assert _result(floor_ms=90.0).moved_gb("patched") == 0
    assert result.slower() == [("compiled patched", "compiled stock", 70 / 75)]
    rope = variants.Rope(gb=2.0, stock_ms=4.0, patched_ms=0.5, exact=True, copy_gb_s=4000.0)
    assert (rope.stock_share, rope.patched_share) == (0.125, 1.0)


def test_the_notes_describe_the_measurement():
    rope = variants.Rope(gb=1.34, stock_ms=4.0, patched_ms=0.4, exact=True, copy_gb_s=4000.0)
    shown = text(variants.table(_result(other_cores=1.5, rope=rope, layers=4)))
    assert "model 14b-480p: 32,760 tokens, 4 of 40 layers, bf16" in shown
    assert "the same 406 matrix products and 80 attention calls alone" in shown
    assert "at 4,000 GB/s" in shown
    assert "patched 0.400 ms, 84%; bits the same" in shown
    assert "~ other processes kept 1.5 cores busy: no verdict" in shown
    assert "Slower than" not in shown
    assert "Slower than compiled stock: compiled patched, 0.93x" in text(variants.table(_result()))
    assert "within 0.25" in shown
    assert "~0.800" in shown
    assert "NO" not in shown
    rows = (_result().rows[0], replace(_result().rows[1], exact=False))
    wrong = _result(rows=rows, rope=replace(rope, exact=False))
    assert "NO" in text(variants.table(wrong))
    assert wrong.different() == ["patched", "rotary embedding"]


def test_json_has_the_result_and_derived_numbers(tmp_path):
    result = _result(rope=variants.Rope(gb=2.0, stock_ms=4.0, patched_ms=0.5, exact=True, copy_gb_s=4000.0))
    variants.write_json(tmp_path / "x.json", result, CPU, threads=1)
    written = (tmp_path / "x.json").read_text()
    content = json.loads(written)
    assert variants.from_json(content) == result
    assert variants.from_json(json.loads(json.dumps(variants.to_json(_result())))) == _result()
    assert content["machine"].keys() >= {"cpu", "device", "torch", "diffusers"}
    assert content["machine"]["threads"] == 1
    assert content["rows"][1]["of_floor"] == 80 / 60
    assert content["rope"]["patched_share"] == 1.0
    assert "/" not in written


def test_a_chart_is_drawn_if_matplotlib_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    variants.chart(_result(), CPU).savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib must be installed for charts"):
        variants.chart(_result(), CPU)


def test_a_floor_above_what_contains_it_gives_no_verdict():
    result = _result()
    assert not result.is_disturbed
    slow = replace(
        result, rows=tuple(replace(row, ms=row.ms and row.ms * (1 + (row.way == "patched"))) for row in result.rows)
    )
    assert [way for way, _, _ in slow.slower()] == ["patched", "compiled patched"]
    noisy = replace(slow, floor_ms=result.row("stock").ms + 1)
    assert noisy.is_disturbed
    assert noisy.slower() == []
    shown = " ".join(text(variants.table(noisy)).split())
    assert "the floor took longer than what contains it: no verdict. Run again." in shown
