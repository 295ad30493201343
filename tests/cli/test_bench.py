"""`wan-patches bench`: what its commands hand on, print and write, and their exit status."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from wan_patches import cli
from wan_patches.bench import block, model, ops, overhead, shapes, variants

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


def test_bench_ops_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_cases", lambda quick: [ops._rope((1, 64, 2, 32))])
    done = run("bench", "ops", "--quick", "--dtype", "fp32", "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    assert "1x64x2x32" in done.output
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["exact"] is True


def test_bench_ops_fails_if_a_bit_differs(monkeypatch):
    rows = [ops.Row("rope", "1x2", "bf16", 2.0, 1.0, None, None, exact=False)]
    monkeypatch.setattr(ops, "measure", lambda *args, **kwargs: rows)
    done = run("bench", "ops")
    assert done.exit_code == 1
    assert "NOT bit-identical: rope 1x2." in done.output


def test_rows_are_printed_even_if_the_file_cannot_be_written(tmp_path, monkeypatch):
    def measure(repeats):
        (tmp_path / "folder").rmdir()
        return [overhead.Row(*(["0"] * len(dataclasses.fields(overhead.Row))))]

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(overhead, "measure", measure)
    monkeypatch.setattr(overhead, "table", lambda rows: f"{len(rows)} rows")
    done = run("bench", "overhead", "--json", str(tmp_path / "folder" / "rows.json"))
    assert done.exit_code == 2
    first, second = done.output.splitlines()
    assert first == "1 rows"
    assert second.startswith("Error: ")
    assert "rows.json was not written: " in second


def test_a_difference_has_precedence_over_a_file_error(monkeypatch, tmp_path):
    rows = [ops.Row("rope", "1x2", "bf16", 2.0, 1.0, None, None, exact=False)]
    monkeypatch.setattr(ops, "measure", lambda *args, **kwargs: rows)
    monkeypatch.setattr(ops, "write_json", lambda path, *more: path.mkdir(exist_ok=False, parents=False))
    (tmp_path / "rows.json").touch()
    done = run("bench", "ops", "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 1
    assert "was not written" in done.output
    assert "NOT bit-identical: rope 1x2." in done.output


def test_bench_block_prints_writes_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["bench", "block", "--shape", "tiny", "--device", "cpu", "--seconds", "0", "--threads", "1"]
    files = ["--json", str(tmp_path / "block.json"), "--chart", str(tmp_path / "block.png")]
    done = run(*arguments, *files)
    assert done.exit_code == 0, done.output
    assert "block tiny: 72 tokens, bf16" in done.output
    found = variants.from_json(json.loads((tmp_path / "block.json").read_text()))
    assert (found.bench, found.shape, found.dtype, found.tokens) == ("block", "tiny", "bf16", 72)
    assert found.rope is not None
    assert (tmp_path / "block.png").stat().st_size > 1000


def test_bench_block_fails_if_a_bit_differs(monkeypatch):
    result = block.measure(shapes.shape_of("tiny", CPU), CPU, torch.float32, compiled=False, seconds=0.0)
    rows = tuple(variants.Row(row.way, 1.0, 1.0, row.way == "stock", 1e-3) for row in result.rows)
    monkeypatch.setattr(block, "measure", lambda *a, **k: variants.replace(result, rows=rows))
    done = run("bench", "block", "--shape", "tiny", "--device", "cpu")
    assert done.exit_code == 1
    assert "NOT bit-identical: patched." in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "15b"], "'15b' is not one of 14b-480p"),
        (["--shape", "tiny", "--frames", "8"], "8 frames of 96x64 do not suit tiny"),
        (["--shape", "tiny", "--device", "toaster"], "The device 'toaster' cannot be used"),
        (["--shape", "tiny", "--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
@pytest.mark.parametrize("name", ["block", "model", "pipeline"])
def test_user_errors_are_reported_before_the_measurement(name, arguments, message):
    done = run("bench", name, *(["--device", "cpu"] * ("--device" not in arguments)), *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_bench_model_takes_fewer_layers_and_another_video(tmp_path):
    arguments = ["bench", "model", "--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--seconds", "0"]
    more = ["--layers", "1", "--frames", "5", "--size", "64x32", "--json", str(tmp_path / "model.json")]
    done = run(*arguments, *more)
    assert done.exit_code == 0, done.output
    assert "model tiny: 16 tokens, 1 of 2 layers, fp32" in done.output
    found = variants.from_json(json.loads((tmp_path / "model.json").read_text()))
    assert (found.video, found.layers, found.attentions) == ((2, 4, 8), 1, 2)


def test_all_variants_and_the_floor_use_the_attention_backend():
    arguments = ["bench", "model", "--shape", "tiny", "--device", "cpu", "--seconds", "0", "--attention"]
    done = run(*arguments, "_native_math")
    assert done.exit_code == 0, done.output
    assert "model tiny: 72 tokens, bf16, _native_math" in done.output
    done = run(*arguments, "telepathy")
    assert done.exit_code == 2
    assert "The attention backend 'telepathy' cannot be used: " in done.output


def test_compiled_variants_are_opt_in_on_a_cpu(monkeypatch):
    asked = []

    def measure(shape, device, dtype, *, compiled, **_):
        asked.append(compiled)
        raise variants.MeasurementError("enough")

    monkeypatch.setattr(model, "measure", measure)
    for more in ([], ["--compile"], ["--no-compile"]):
        done = run("bench", "model", "--shape", "tiny", "--device", "cpu", *more)
        assert "enough" in done.output
    assert asked == [False, True, False]


@pytest.mark.slow
def test_bench_pipeline_takes_steps(tmp_path):
    arguments = ["bench", "pipeline", "--shape", "tiny", "--device", "cpu", "--seconds", "0", "--steps", "1"]
    done = run(*arguments, "--json", str(tmp_path / "pipeline.json"))
    assert done.exit_code == 0, done.output
    assert "pipeline tiny: 72 tokens, 1 step, bf16" in done.output
    assert variants.from_json(json.loads((tmp_path / "pipeline.json").read_text())).steps == 1
