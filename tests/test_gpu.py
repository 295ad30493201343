"""Whole pipelines on an NVIDIA GPU, stock against patched: `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.bench.models import FAMILIES, available

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_final_videos_are_bit_identical(name, dtype, output_type):
    family = FAMILIES[name]
    pipe = family.build(dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def run():
        torch.manual_seed(0)
        generator = torch.Generator("cuda").manual_seed(0)
        return pipe(**family.inputs(generator=generator, output_type=output_type)).frames

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        first, stock = run(), run()
        if not _same(first, stock):
            pytest.skip("two stock runs differ here")
        with wan_patches.enabled():
            patched = [run(), run()]  # at first sight, and after it
            verdicts = wan_patches.status().verdicts
    assert all(_same(stock, video) for video in patched)
    assert all(verdict.exact for verdict in verdicts), verdicts


def _same(a, b):
    if isinstance(a, list):
        return all(x.tobytes() == y.tobytes() for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))
    return np.array_equal(a, b)
