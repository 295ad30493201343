"""The benches of block, forward and pipeline where tensors are not on the CPU. Their times mean nothing there."""

from __future__ import annotations

import pytest
import torch

from wan_patches.bench import block, model, pipeline, shapes, variants
from wan_patches.tables import text

pytestmark = pytest.mark.npu_emulated

TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]


@pytest.mark.loop("tiny")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "bench", [pipeline, *(pytest.param(bench, marks=pytest.mark.slow) for bench in (block, model))]
)
def test_it_measures_there(bench, name, device, tmp_path):
    npu = torch.device("npu")
    shape = shapes.shape_of(name, npu)
    before = device.ops()
    result = bench.measure(shape, npu, torch.float32, compiled=False, seconds=0.0)
    assert device.ops() != before
    assert result.deterministic
    assert result.different() == []
    assert result.row("patched").exact is True
    assert result.row("patched").reason == ""
    assert {parameter.device.type for parameter in shapes.build(shape, npu, torch.float32).parameters()} == {"npu"}
    assert result.bench in text(variants.table(result))
    variants.write_json(tmp_path / "x.json", result, npu)
