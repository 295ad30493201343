"""Compiled models: same bits, our formulation in the graph, no graph break and no recompile loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import wan_patches
from wan_patches.ops import rope
from wan_patches.patching import tally
from wan_patches.testing.families import FAMILIES, available

# What a graph must hold for the rotary embedding of one layer: queries and keys
STACKS_PER_LAYER = 2

# One of each kind of attention processor
NAMES = [name for name in ("wan_t2v", "skyreels_v2_t2v", "chronoedit", "helios_i2v") if name in available()]
MAIN = [name for name in ("wan_t2v", "helios_i2v") if name in NAMES]
FIRST = [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]


class Graphs:
    """A backend that keeps what dynamo hands it."""

    def __init__(self, backend: str = "eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return self._backend(graph, inputs)

    def calls(self, nth: int) -> Counter[str]:
        """How often the `nth` graph calls what, by name."""
        nodes = [n for n in self.graphs[nth].graph.nodes if n.op in ("call_function", "call_method")]
        return Counter(getattr(n.target, "__name__", str(n.target)) for n in nodes)


@pytest.fixture(autouse=True)
def _fresh_dynamo(one_thread: None) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def model_and_call(
    name: str, dtype: torch.dtype = torch.float32, layers: int = 1
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A transformer, and what its pipeline calls it with in the last step."""
    pipe = FAMILIES[name].build(dtype=dtype, transformer={"num_layers": layers})
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe(**FAMILIES[name].inputs(steps=1, output_type="latent"))
    hook.remove()
    return pipe.transformer, {**calls[-1], "return_dict": False}


def run(model: Any, call: dict[str, Any]) -> torch.Tensor:
    out = model(**call)[0]
    assert out.isfinite().all()
    return out


def is_ours(calls: Counter[str]) -> bool:
    """Whether a graph rotates by stacking; fails where it is neither that nor stock's form."""
    assert (calls["stack"] > 0) != (calls["setitem"] > 0), calls
    return calls["stack"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_our_formulation_is_in_the_one_graph_and_strided_stores_are_not(name):
    model, call = model_and_call(name, layers=2)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    stock = run(compiled, call)
    assert graphs.calls(0)["stack"] == 0  # or the assertions below say nothing
    assert graphs.calls(0)["setitem"] > 0
    assert graphs.calls(0)["empty_like"] > 0
    wan_patches.enable()
    patched = run(compiled, call)
    assert torch.equal(stock, patched)
    assert len(graphs.graphs) == 2
    calls = graphs.calls(1)
    assert calls["stack"] >= STACKS_PER_LAYER * 2
    assert calls["setitem"] == calls["empty_like"] == calls["copy_"] == 0


@pytest.mark.parametrize("name", FIRST)
def test_enabled_before_compile_is_the_same(name):
    model, call = model_and_call(name)
    stock = run(torch.compile(model, fullgraph=True, backend="eager"), call)
    torch._dynamo.reset()
    with wan_patches.enabled():
        graphs = Graphs()
        assert torch.equal(stock, run(torch.compile(model, fullgraph=True, backend=graphs), call))
        assert is_ours(graphs.calls(0))


@pytest.mark.parametrize("name", FIRST)
def test_bf16_is_bit_identical_under_aot_autograd(name):
    model, call = model_and_call(name, torch.bfloat16)
    stock = run(torch.compile(model, fullgraph=True, backend="aot_eager"), call)
    torch._dynamo.reset()
    with wan_patches.enabled():
        graphs = Graphs("aot_eager")
        patched = run(torch.compile(model, fullgraph=True, backend=graphs), call)
        assert is_ours(graphs.calls(0))
    assert patched.dtype == stock.dtype
    assert torch.equal(stock, patched)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_inductor_is_bit_identical_to_compiled_stock(name):
    model, call = model_and_call(name)
    graphs = Graphs("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    stock = run(compiled, call)
    assert torch.equal(stock, run(compiled, call))  # bf16 would fail here already, in stock
    wan_patches.enable()
    assert torch.equal(stock, run(compiled, call))
    assert is_ours(graphs.calls(-1))
    wan_patches.disable()
    assert torch.equal(stock, run(compiled, call))
    assert len(graphs.graphs) == 2


@pytest.mark.parametrize("name", FIRST)
def test_twenty_toggles_of_a_compiled_model_compile_nothing_more(name):
    model, call = model_and_call(name)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    stock = run(compiled, call)
    wan_patches.enable()
    assert torch.equal(stock, run(compiled, call))
    assert len(graphs.graphs) == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            wan_patches.disable()
            assert torch.equal(stock, run(compiled, call))
            wan_patches.enable()
            assert torch.equal(stock, run(compiled, call))
    assert len(graphs.graphs) == 2
    assert not counters["graph_break"]


def test_toggling_other_patches_leaves_a_compiled_transformer_alone():
    model, call = model_and_call("wan_t2v")
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    run(compiled, call)
    with torch._dynamo.config.patch(error_on_recompile=True), wan_patches.enabled(["conditioning", "frames"]):
        run(compiled, call)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("name", MAIN)
def test_compiled_blocks_have_one_more_graph_and_no_more(name):
    model, call = model_and_call(name, layers=2)
    stock = run(model, call)
    graphs = Graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    assert torch.equal(stock, run(model, call))
    before = len(graphs.graphs)
    assert before >= 1
    wan_patches.enable()
    assert torch.equal(stock, run(model, call))
    after = len(graphs.graphs)
    assert before < after <= 2 * before
    assert all(is_ours(graphs.calls(nth)) for nth in range(before, after))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            wan_patches.disable()
            assert torch.equal(stock, run(model, call))
            wan_patches.enable()
            assert torch.equal(stock, run(model, call))
    assert len(graphs.graphs) == after
    assert not counters["graph_break"]


def test_a_new_shape_costs_patched_as_many_graphs_as_stock():
    def count(model: torch.nn.Module, calls: list[dict[str, Any]]) -> int:
        torch._dynamo.reset()
        graphs = Graphs()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        outputs = [run(compiled, call) for call in calls]
        assert all(torch.equal(run(model, call), out) for call, out in zip(calls, outputs, strict=True))
        return len(graphs.graphs)

    model, call = model_and_call("wan_t2v")
    video = call["hidden_states"]
    calls = [{**call, "hidden_states": video.repeat(1, 1, n, 1, 1)} for n in (1, 2, 3, 4)]
    stock = count(model, calls)
    with wan_patches.enabled():
        assert count(model, calls) == stock


def test_no_cpu_probe_or_gate_runs_while_compiling(monkeypatch):
    def never(*args: Any) -> Any:
        raise AssertionError("not for compiled graphs")

    model, call = model_and_call("wan_t2v")
    stock = run(model, call)
    for name in ("reference", "_key", "_first"):
        monkeypatch.setattr(rope.apply_rotary_emb, name, never)
    monkeypatch.setattr(tally, "count", never)
    with wan_patches.enabled():
        assert torch.equal(stock, run(torch.compile(model, fullgraph=True, backend="eager"), call))
        with pytest.raises(AssertionError, match="not for compiled graphs"):  # eager does run one of them
            run(model, call)


def test_a_wrong_formulation_would_be_noticed(monkeypatch):
    def inexact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((torch.addcmul(first * cos, second, sin, value=-1), first * sin + second * cos), dim=-1)
        return (pairs * (1 + 2**-20)).flatten(-2).type_as(x)

    model, call = model_and_call("wan_t2v")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    stock = run(compiled, call)
    monkeypatch.setattr(rope.apply_rotary_emb, "traced", inexact)
    with wan_patches.enabled():
        assert not torch.equal(stock, run(compiled, call))


def test_training_a_compiled_model_has_the_gradients_of_compiled_stock():
    model, call = model_and_call("wan_t2v")
    stock: list[torch.Tensor] = []
    for patched in (False, True):
        torch._dynamo.reset()
        (wan_patches.enable if patched else wan_patches.disable)()
        graphs = Graphs("aot_eager")
        with torch.enable_grad():
            model.zero_grad()
            run(torch.compile(model, fullgraph=True, backend=graphs), call).square().mean().backward()
        assert is_ours(graphs.calls(0)) == patched
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        stock = stock or gradients
        assert len(gradients) == len(stock) > 20
        assert all(torch.equal(a, b) for a, b in zip(stock, gradients, strict=True))
