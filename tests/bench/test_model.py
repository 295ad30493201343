"""The benchmark of a forward."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from wan_patches.bench import model, shapes, variants
from wan_patches.tables import text

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.loop("tiny", "tiny-helios")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_stock_and_patched_give_the_same_bits(name, dtype):
    result = model.measure(shapes.shape_of(name, CPU), CPU, dtype, compiled=False, seconds=0.0)
    assert result.deterministic
    assert result.row("patched").exact is True
    assert result.attentions == 2 * result.layers
    assert result.rope is None
    assert result.floor_ms > 0
    assert result.dtype == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


@pytest.mark.slow
def test_regional_compilation_compiles_the_blocks(monkeypatch):
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(list(graph.graph.nodes)))
        return graph.forward

    monkeypatch.setattr(variants, "BACKEND", backend)
    shape = shapes.shape_of("tiny", CPU)
    results = [
        model.measure(shape, CPU, torch.float32, compiled=True, regional=regional, seconds=0.0)
        for regional in (False, True)
    ]
    torch._dynamo.reset()
    assert len(sizes) == 4  # two blocks share a graph
    assert max(sizes[2:]) < min(sizes[:2]) * 0.7
    assert [result.regional for result in results] == [False, True]
    assert all(result.row(variants.COMPILED).exact for result in results)
    assert "Compiled: the blocks" in text(variants.table(results[1]))
