"""Predicted times: what they are made of, and measurements beside them."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from wan_patches.bench import predict, shapes, variants
from wan_patches.bench.measure import MeasurementError
from wan_patches.bench.predict import ATTENTION, CONVOLUTIONS, PATCHED, PRODUCTS, REACHED, STOCK, Row
from wan_patches.bench.traffic import Call
from wan_patches.cli import app
from wan_patches.tables import text

SECONDS = {card.name: 1.0 for card in predict.CARDS}


def _seconds(*calls):
    return predict._row("x", STOCK, predict._group(calls[0]), calls).seconds


def test_a_call_takes_as_long_as_its_bytes_need():
    found = _seconds(Call("add", "", int(3350e9)), Call("add", "", int(3350e9)))
    assert found["H100"] == pytest.approx(2 / REACHED["memory"], rel=1e-4)
    assert found["H200"] == pytest.approx(found["H100"] * 3350 / 4800, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "of", "tflops"),
    [
        ("mm", torch.bfloat16, PRODUCTS, 989),
        ("mm", torch.float32, PRODUCTS, 67),
        ("convolution", torch.float32, CONVOLUTIONS, 495),
        ("_scaled_dot_product_flash_attention", torch.float16, ATTENTION, 989),
    ],
)
def test_a_product_takes_as_long_as_its_operations_need_in_its_dtype(name, dtype, of, tflops):
    call = Call(name, "", 1000, flops=int(tflops * 1e12), dtype=dtype)
    assert predict._group(call) == of
    assert _seconds(call)["H100"] == pytest.approx(1 / REACHED[of], rel=1e-4)


def test_a_product_that_waits_for_memory_takes_as_long_as_its_bytes_need():
    call = Call("mm", "", int(3350e9), flops=10, dtype=torch.bfloat16)
    assert _seconds(call)["H100"] == pytest.approx(1 / REACHED["memory"], rel=1e-4)


def test_a_forward_has_the_same_products_and_less_traffic_with_patches():
    rows = predict.measure("1.3b-480p")
    assert {row.subject for row in rows} == {"1.3b-480p"}
    of = {way: {row.of: row for row in rows if row.way == way} for way in (STOCK, PATCHED)}
    for kind in (PRODUCTS, ATTENTION):
        assert of[STOCK][kind].calls == of[PATCHED][kind].calls
        assert of[STOCK][kind].tflop == of[PATCHED][kind].tflop
    shape = shapes.SHAPES["1.3b-480p"]
    attention = 4 * shape.tokens * 1536 * (shape.tokens + shapes.TEXT_TOKENS) * shape.layers
    assert of[PATCHED][ATTENTION].tflop == pytest.approx(attention / 1e12, rel=1e-4)
    stock, patched = (sum(row.gb for row in of[way].values() if not row.tflop) for way in (STOCK, PATCHED))
    assert patched < 0.5 * stock
    pytest.importorskip("triton")
    # a kernel for queries, one for keys
    assert of[PATCHED]["RMS norms and rotary embedding of queries and keys"].calls == 2 * shape.layers


def test_unknown_names_are_refused():
    with pytest.raises(MeasurementError, match=r"called 'nope'; there are: 14b-480p; .*decode 480p, fp32"):
        predict.measure("nope")


ROWS = [
    *(Row("14b-480p", way, PRODUCTS, 10, 5.0, 100.0, SECONDS) for way in (STOCK, PATCHED)),
    Row("14b-480p", STOCK, "add", 10, 1400.0, 0.0, SECONDS),
    Row("14b-480p", PATCHED, "gated residual", 10, 560.0, 0.0, SECONDS),
    *(Row("decode 480p, fp32", way, CONVOLUTIONS, 10, 5.0, 1.0, SECONDS) for way in (STOCK, PATCHED)),
]


def _measured(folder, stock, patched):
    rows = (variants.Row("stock", ms=stock), variants.Row("patched", ms=patched))
    result = variants.Result(
        **{"bench": "model", "shape": "14b-480p", "dtype": "bf16", "video": (21, 60, 104), "tokens": 32760},
        **{"layers": 40, "of_layers": 40, "rows": rows, "floor_ms": 3000.0, "matmuls": 1, "attentions": 1},
        **{"copy_gb_s": 2800.0, "deterministic": True, "patches": ()},
    )
    machine = {"device": "NVIDIA H100 80GB HBM3"}
    (folder / "model-14b-480p.json").write_text(json.dumps({"machine": machine, **variants.to_json(result)}))
    decode = {"op": "decode", "shape": "81x480x832", "dtype": "fp32", "stock_ms": 1100.0, "patched_ms": 1500.0}
    other = {**decode, "op": "encode"}
    (folder / "vae-fp32-480p.json").write_text(json.dumps({"machine": machine, "rows": [decode, other]}))
    (folder / "broken.json").write_text("{")


def test_measurements_stand_beside_their_prediction_and_those_that_are_off_are_marked(tmp_path):
    _measured(tmp_path, stock=3600.0, patched=4000.0)
    found = {what: numbers for what, *numbers in predict._beside(ROWS, tmp_path)}
    assert found == {
        "14b-480p, stock": [3500.0, 3600.0],  # the floor, and 1,400 GB at 2,800 GB/s
        "14b-480p, patched": [3200.0, 4000.0],
        "decode 480p, fp32, stock": [1000.0, 1100.0],
        "decode 480p, fp32, patched": [1000.0, 1500.0],
    }
    shown = text(predict.table(ROWS, tmp_path))
    off = {line.split("  ")[0].strip(): "<-" in line for line in shown.splitlines() if "%" in line and ", " in line}
    assert off["14b-480p, stock"] is False
    assert off["14b-480p, patched"] is True
    assert off["decode 480p, fp32, patched"] is True


def test_the_file_holds_the_rows(tmp_path):
    predict.write_json(tmp_path / "new" / predict.FILE, ROWS)
    assert predict.read_json(tmp_path / "new" / predict.FILE) == ROWS


def test_the_command_predicts_writes_and_needs_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "measure", lambda only: [row for row in ROWS if only in row.subject])
    done = CliRunner().invoke(app, ["bench", "gpu", "--predict", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Predicted, not measured" in done.output
    assert predict.read_json(tmp_path / predict.FILE) == ROWS
    done = CliRunner().invoke(app, ["bench", "gpu", "--predict", "--only", "14b"])
    assert "14b-480p, patched" in done.output
    assert "gated residual" in done.output


def test_a_folder_is_needed_to_measure():
    done = CliRunner().invoke(app, ["bench", "gpu"])
    assert done.exit_code == 2
    assert "--out" in done.output
