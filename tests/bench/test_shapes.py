"""The published models and their videos."""

from __future__ import annotations

import diffusers
import pytest
import torch

from wan_patches.bench import block, shapes
from wan_patches.bench.measure import MeasurementError

CPU = torch.device("cpu")
TINY = [name for name, shape in shapes.SHAPES.items() if name.startswith("tiny") and shape.available]
AVAILABLE = [name for name, shape in shapes.SHAPES.items() if shape.available]


@pytest.mark.parametrize(
    ("name", "billions", "tokens"),
    [
        ("14b-480p", 14.29, 32760),
        ("14b-720p", 14.29, 75600),
        ("1.3b-480p", 1.42, 32760),
        ("ti2v-5b", 5.0, 27280),
        ("helios", 14.3, 9 * 960 + 2 * 960 + 240 + 240),
    ],
)
def test_sizes_are_the_published_ones(name, billions, tokens):
    shape = shapes.SHAPES[name]
    assert shape.tokens == tokens
    if not shape.available:
        pytest.skip("not in this diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, shape.model)(**shape.config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)
    assert len(model.blocks) == shape.layers


@pytest.mark.parametrize("name", AVAILABLE)
def test_on_a_cpu_there_are_about_4000_tokens(name):
    assert name.startswith("tiny") or 3900 < shapes.shape_of(name, CPU).tokens < 4500
    assert shapes.shape_of(name, torch.device("meta")) == shapes.SHAPES[name]


@pytest.mark.parametrize("name", TINY)
def test_models_are_like_loaded_ones(name):
    shape = shapes.shape_of(name, CPU)
    before = torch.random.get_rng_state()
    model = shapes.build(shape, CPU, torch.bfloat16)
    again = shapes.build(shape, CPU, torch.bfloat16)
    made = getattr(diffusers, shape.model)(**shape.config)
    torch.random.set_rng_state(before)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), made.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    kept = set(type(model)._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name
        assert torch.equal(parameter, again.get_parameter(name))
        assert len(parameter.unique()) > 1
    with torch.no_grad():
        assert model(**shapes.inputs(shape, model, CPU, torch.bfloat16))[0].isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_blocks_get_the_number_of_tokens_of_the_shape(name):
    shape = shapes.shape_of(name, CPU, layers=1, frames=13, size=(160, 96))
    model = shapes.build(shape, CPU, torch.float32)
    with torch.no_grad():
        (hidden_states, *_), _ = block._handed(model, shapes.inputs(shape, model, CPU, torch.float32))
    assert hidden_states.shape[1] == shape.tokens
    assert shape.layers == 1
    assert shape.published.layers == 2


def test_tokens_of_the_first_frame_have_timestep_0():
    shape = shapes.shape_of("tiny-ti2v", CPU)
    model = shapes.build(shape, CPU, torch.float32)
    timestep = shapes.inputs(shape, model, CPU, torch.float32)["timestep"]
    assert timestep.shape == (1, shape.tokens)
    assert timestep[0].unique_consecutive(return_counts=True)[1].tolist() == [shape.tokens // 3, shape.tokens // 3 * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "15b"}, "Unknown shape '15b'; known: 14b-480p"),
        ({"name": "tiny", "frames": 8}, "8 frames of 96x64 do not suit tiny"),
        ({"name": "tiny", "size": (72, 64)}, "multiples of 16"),
        ({"name": "tiny-ti2v", "size": (80, 64)}, "multiples of 32"),
    ],
)
def test_invalid_shapes_are_reported(arguments, message):
    with pytest.raises(MeasurementError, match=message):
        shapes.shape_of(device=CPU, **arguments)
