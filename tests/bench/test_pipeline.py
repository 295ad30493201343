"""The benchmark of a pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wan_patches.bench import pipeline, shapes, variants

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]

pytestmark = pytest.mark.usefixtures("one_thread")


# some CPUs take minutes for the autoencoder's convolutions in bf16
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TINY[:1] + [pytest.param(name, marks=pytest.mark.slow) for name in TINY[1:]])
def test_stock_and_patched_give_the_same_bits(name, dtype):
    result = pipeline.measure(shapes.shape_of(name, CPU), CPU, dtype, compiled=False, seconds=0.0, steps=2)
    assert result.deterministic
    assert result.row("patched").exact is True
    assert result.steps == 2
    # with guidance two forwards a step, and the autoencoder's own attention
    assert result.attentions >= 2 * 2 * 2 * result.layers
    assert result.matmuls > 2 * 2 * 10 * result.layers


@pytest.mark.parametrize("name", TINY)
def test_videos_are_finite_and_equal_for_every_call_and_have_the_right_size(name):
    shape = shapes.shape_of(name, CPU)
    pipe, arguments = pipeline.build_pipeline(shape, CPU, torch.float32, steps=1)
    first, second = (pipe(**arguments()).frames for _ in range(2))
    assert first.shape == (1, shape.frames, shape.height, shape.width, 3)
    assert np.isfinite(first).all()
    assert first.std() > 0
    assert np.array_equal(first, second)


def test_the_autoencoder_can_have_a_dtype_of_its_own():
    shape = shapes.shape_of("tiny", CPU)
    pipe, _ = pipeline.build_pipeline(shape, CPU, torch.bfloat16, steps=1, vae_dtype=torch.float32)
    assert (pipe.vae.dtype, pipe.transformer.dtype) == (torch.float32, torch.bfloat16)
    result = pipeline.measure(shape, CPU, torch.bfloat16, compiled=False, seconds=0.0, steps=1, vae_dtype=torch.float32)
    assert result.row("patched").exact is True
    assert "bf16, autoencoder fp32" in variants.describe(result)
    assert variants.from_json(variants.to_json(result)).vae_dtype == "fp32"
