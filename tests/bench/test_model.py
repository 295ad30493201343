"""The bench of a forward."""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo
from typer.testing import CliRunner

from wan_patches import cli
from wan_patches.bench import model, shapes, variants
from wan_patches.tables import text

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.loop("tiny", "tiny-helios")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_stock_and_patched_give_the_same(name, dtype):
    result = model.measure(shapes.shape_of(name, CPU), CPU, dtype, compiled=False, seconds=0.0)
    assert result.deterministic
    assert result.row("patched").exact is True
    assert result.attentions == 2 * result.layers
    assert result.rope is None
    assert result.floor_ms > 0
    assert result.dtype == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def test_the_command_takes_fewer_layers_and_another_video(tmp_path):
    arguments = ["bench", "model", "--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--seconds", "0"]
    more = ["--layers", "1", "--frames", "5", "--size", "64x32", "--json", str(tmp_path / "model.json")]
    done = CliRunner().invoke(cli.app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert "model tiny: 16 tokens, 1 of 2 layers, fp32" in done.output
    found = variants.from_json(json.loads((tmp_path / "model.json").read_text()))
    assert (found.video, found.layers, found.attentions) == ((2, 4, 8), 1, 2)


@pytest.mark.slow
def test_blocks_are_compiled_where_that_is_asked_for(monkeypatch):
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


def test_the_attention_backend_is_that_of_all_ways_and_of_the_floor():
    arguments = ["bench", "model", "--shape", "tiny", "--device", "cpu", "--seconds", "0", "--attention"]
    done = CliRunner().invoke(cli.app, [*arguments, "_native_math"])
    assert done.exit_code == 0, done.output
    assert "model tiny: 72 tokens, bf16, _native_math" in done.output
    done = CliRunner().invoke(cli.app, [*arguments, "telepathy"])
    assert done.exit_code == 2
    assert "The attention backend 'telepathy' cannot be used: " in done.output


def test_compiled_ways_are_asked_for_on_a_cpu(monkeypatch):
    asked = []

    def measure(shape, device, dtype, *, compiled, **_):
        asked.append(compiled)
        raise variants.MeasurementError("enough")

    monkeypatch.setattr(model, "measure", measure)
    for more in ([], ["--compile"], ["--no-compile"]):
        done = CliRunner().invoke(cli.app, ["bench", "model", "--shape", "tiny", "--device", "cpu", *more])
        assert "enough" in done.output
    assert asked == [False, True, False]
