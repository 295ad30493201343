"""The benchmark of the autoencoder: both sides give the same bits, and the patched side uses the patches."""

from __future__ import annotations

import json

import pytest
import torch

from wan_patches.bench import vae, vae_parallel
from wan_patches.ops.conditioning import ConditionVideo
from wan_patches.ops.vae import FrameCaches

CPU = torch.device("cpu")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", vae.cases(CPU, quick=True))
def test_only_the_patched_side_uses_the_patches(case, monkeypatch):
    taken = []
    for cls in (FrameCaches, ConditionVideo):
        original = cls.__init__
        monkeypatch.setattr(cls, "__init__", lambda self, *a, o=original, **k: (taken.append(1), o(self, *a, **k))[1])
    with torch.no_grad():
        stock, patched = case.make(CPU, torch.float32)
        first = stock()
        assert not taken
        second = patched()
        assert taken
    assert torch.equal(*(x[1] if isinstance(x, tuple) else x for x in (first, second)))


def test_every_shape_is_valid_for_its_model():
    for device in (CPU, torch.device("cuda")):
        for case in vae.cases(device):
            frames, height, width = map(int, case.shape.split("x"))
            assert (frames - 1) % 4 == 0
            assert height % 16 == width % 16 == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_rows_are_shown_and_written(tmp_path):
    rows, shared = vae.measure(CPU, torch.float32, quick=True, parallel=False)
    of_wan = ["decode", "encode", "encode pictures"]
    of_qwen_image = [f"{what}, Qwen-Image" for what in of_wan]
    assert [row.op for row in rows] == [*of_wan, *of_qwen_image, "condition video, VAE without work"]
    assert all(row.exact and row.stock_ms > 0 for row in rows)
    shared = [vae_parallel.Row(vae_parallel.Case("decode"), 2, 3.0, 2.0, False)]
    vae.table(rows, shared)
    vae.write_json(tmp_path / "vae.json", rows, shared, CPU)
    content = json.loads((tmp_path / "vae.json").read_text())
    assert content["shared"][0]["ratio"] == 1.5
    assert len(content["rows"]) == len(rows)
