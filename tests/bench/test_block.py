"""The benchmark of a block: the arguments from the model, and the rotary embedding alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import wan_patches
from wan_patches import cli
from wan_patches.bench import block, shapes, variants
from wan_patches.ops import rope
from wan_patches.ops.modulation import SegmentedModulation

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.loop("tiny", "tiny-helios")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_stock_and_patched_give_the_same_bits(name, dtype):
    result = block.measure(shapes.shape_of(name, CPU), CPU, dtype, compiled=False, seconds=0.0)
    assert result.deterministic
    assert result.row("patched").exact is True
    assert result.different() == []
    assert (result.matmuls, result.attentions) == (10, 2)
    assert result.rope.exact
    assert "rope" in result.patches
    if result.row("patched, close").ms is not None:
        assert result.row("patched, close").difference < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_each_variant_of_the_block_gets_the_arguments_of_the_models_forward(name, any_size, monkeypatch):
    handed = []
    original = block._handed

    def noted(model, arguments):
        handed.append((wan_patches._registry.chosen().names, original(model, arguments)))
        return handed[-1][1]

    monkeypatch.setattr(block, "_handed", noted)
    block.measure(shapes.shape_of(name, CPU), CPU, torch.float32, compiled=False, seconds=0.0)
    assert {frozenset(), None} == {names for names, _ in handed}
    first = [args[0] for _, (args, _) in handed]
    assert all(torch.equal(hidden_states, first[0]) for hidden_states in first)
    if name == "tiny-helios":
        assert {names: type(args[2]) for names, (args, _) in handed} == {
            frozenset(): torch.Tensor,
            None: SegmentedModulation,
        }


@pytest.mark.parametrize("name", TINY)
def test_the_rotary_embedding_of_the_processor_is_measured(name, monkeypatch):
    shape = shapes.shape_of(name, CPU, layers=1)
    model = shapes.build(shape, CPU, torch.float32)
    arguments = shapes.inputs(shape, model, CPU, torch.float32)
    seen = []
    original = rope.apply_rotary_emb

    def counted(x, cos, sin):
        seen.append(tuple(x.shape))
        return original(x, cos, sin)

    with torch.no_grad():
        right = block._rope(shape, model, arguments, CPU, torch.float32, 0.0)
        monkeypatch.setattr(rope, "apply_rotary_emb", counted)
        for patch in wan_patches._registry.patches():
            module = sys.modules.get(patch.module)
            if hasattr(module, "_wan_patches_rope"):  # the globals of diffusers' module hold the op too
                monkeypatch.setattr(module, "_wan_patches_rope", counted)
        again = block._rope(shape, model, arguments, CPU, torch.float32, 0.0)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    assert set(seen) == {(1, shape.tokens, heads, dim)}
    assert right.exact
    assert again.exact
    size = shape.tokens * heads * dim * 4
    assert right.gb == pytest.approx((4 * size + shape.tokens * dim * 4) / 1e9)


def test_a_wrong_bit_is_detected(monkeypatch):
    module = __import__("diffusers.models.transformers.transformer_wan", fromlist=["_"])
    shape = shapes.shape_of("tiny", CPU)
    block.measure(shape, CPU, torch.float32, compiled=False, seconds=0.0)  # adds the name to the module

    right = rope.apply_rotary_emb.reference

    def wrong(x, cos, sin):
        return right(x, cos, sin) * (1 + 1e-6)

    monkeypatch.setattr(rope, "apply_rotary_emb", wrong)
    monkeypatch.setattr(module, "_wan_patches_rope", wrong)
    result = block.measure(shape, CPU, torch.float32, compiled=False, seconds=0.0)
    assert result.different() == ["patched", "rotary embedding"]
    assert 0 < result.row("patched").difference < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bench", ["block", "model", "pipeline"])
def test_every_variant_runs_on_a_gpu(name, bench, tmp_path):
    arguments = ["bench", bench, "--shape", name, "--device", "cuda", "--seconds", "0"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json", str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "x.json").read_text())
    found = variants.from_json(content)
    assert all(row.ms for row in found.rows if row.way != "patched, close")
    assert not any(row.reason for row in found.rows if row.way != "patched, close")
    assert all(row.peak_mib is not None for row in found.rows if row.ms)
    assert {"cuda", "driver"} <= content["machine"].keys()
