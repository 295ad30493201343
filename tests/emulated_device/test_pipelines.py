"""Whole pipelines on an accelerator: same bits, fewer bytes and no more waits than stock, behind the gate.

The accelerator is emulated on the CPU: what is counted is real, nothing is said about speed.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.ops import rope
from wan_patches.testing.families import FAMILIES, available, images

pytestmark = pytest.mark.npu_emulated

COUNTED = ["conditioning", "frames", "preprocess", "rope", "vae"]  # what others save is counted by their tests
IMAGE_SIZE = (90, 70)  # of no other tensor's number of bytes
IMAGE_BYTES = 90 * 70 * 3
PIXELS_BYTES = 48 * 32 * 3 * 4  # what stock uploads: resized, in fp32
LATENT_FRAME_BYTES = 4 * 6 * 4
MASK_BYTES = 4 * 3 * LATENT_FRAME_BYTES  # of nine frames


@dataclass(frozen=True)
class Expected:
    """What a family uploads: `images` PIL images (`frames` at once), and a mask or none."""

    images: int = 1
    mask: int = MASK_BYTES
    frames: int = 1
    steps: int = 1


EXPECTED = {
    name: expected
    for name, expected in {
        "wan22_i2v": Expected(steps=2),  # of which one is for either transformer
        "wan21_flf2v": Expected(images=2),
        "skyreels_v2_i2v": Expected(),
        "chronoedit": Expected(mask=4 * 2 * LATENT_FRAME_BYTES),  # edits in five frames
        "helios": Expected(images=0, mask=0),
        "helios_i2v": Expected(mask=0),
        "helios_v2v": Expected(mask=0, frames=9),
    }.items()
    if name in available()
}


@dataclass(frozen=True)
class Run:
    """The frames of one call and what it cost."""

    frames: np.ndarray
    uploads: Counter[int]
    downloads: Counter[int]
    waits: Counter[str]
    ops: Counter[str]


def inputs(name: str, **more: Any) -> dict[str, Any]:
    steps = EXPECTED[name].steps
    video = images(2, 9, IMAGE_SIZE)
    image, last = images(0, 1, IMAGE_SIZE)[0], images(1, 1, IMAGE_SIZE)[0]
    return FAMILIES[name].inputs(**{"steps": steps, "image": image, "last_image": last, "video": video, **more})


def run(pipe: Any, name: str, device: Any, **more: Any) -> Run:
    call = inputs(name, **more)
    device.reset()
    video = pipe(**call).frames
    if isinstance(video, list):  # of lists of PIL images
        video = np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in video])
    assert np.isfinite(video).all()
    assert video.std() > 0
    return Run(video, device.uploads(), device.downloads(), device.waits(), device.ops())


@pytest.fixture(scope="module")
def pipelines(_device: Any) -> dict[str, Any]:
    return {}


@pytest.fixture
def build(pipelines: dict[str, Any]) -> Any:
    def built(name: str) -> Any:
        if name not in pipelines:
            pipelines[name] = FAMILIES[name].build(dtype=torch.bfloat16).to("npu")
        return pipelines[name]

    return built


@pytest.fixture
def wan(build: Any) -> Any:
    """Wan 2.2 image to video; its rotary embeddings are those of every call below."""
    return build("wan22_i2v")


@pytest.mark.parametrize("output_type", ["np", "pil"])
@pytest.mark.parametrize("name", EXPECTED)
def test_same_bits_fewer_bytes_and_no_more_waits(name, output_type, build, device):
    pipe, expected = build(name), EXPECTED[name]
    stock = run(pipe, name, device, output_type=output_type)
    with wan_patches.enabled(COUNTED):
        first = run(pipe, name, device, output_type=output_type)
        patched = run(pipe, name, device, output_type=output_type)
        status = wan_patches.status()
    assert np.array_equal(stock.frames, first.frames)
    assert np.array_equal(stock.frames, patched.frames)
    assert stock.frames.strides == patched.frames.strides

    assert not status.skipped()
    judged = {verdict.op for verdict in status.verdicts}
    assert all(verdict.exact for verdict in status.verdicts), status
    assert judged == (
        {"rotary embedding", "frames to float" if output_type == "np" else "frames to uint8"}
        | ({"preprocess"} if expected.images else set())
        | ({"condition mask"} if expected.mask else set())
    )

    # uploads: what is gone, and what is there instead
    gone, new = stock.uploads - patched.uploads, patched.uploads - stock.uploads
    as_stock, as_bytes = PIXELS_BYTES * expected.frames, IMAGE_BYTES * expected.frames
    assert gone == +Counter({as_stock: expected.images, expected.mask: int(expected.mask > 0)})
    assert new == +Counter({as_bytes: expected.images})
    # downloads: the frames, as bytes where bytes are wanted
    assert stock.downloads == {stock.frames.size * 4: 1}
    assert patched.downloads == {stock.frames.size * (4 if output_type == "np" else 1): 1}
    # waits: each kind no more often than in stock, and once for whether there was a NaN, of which numpy warns
    asked = Counter({"aten::_local_scalar_dense": int(output_type == "pil")})
    assert not patched.waits - stock.waits - asked
    assert (stock.waits + asked).total() - patched.waits.total() == int(expected.mask > 0)


def test_the_mask_is_uploaded_by_stock(build, device):  # or "it is not" would say nothing
    stock = run(build("wan22_i2v"), "wan22_i2v", device)
    assert stock.uploads[MASK_BYTES] == 1
    assert stock.uploads[PIXELS_BYTES] == 1


def test_first_sight_is_paid_once_per_kind_of_input(wan, device):
    with wan_patches.enabled():
        first = run(wan, "wan22_i2v", device)
        verdicts = wan_patches.status().verdicts
        # the frames are compared on the host, and of a residual norm two tensors
        assert first.waits["aten::equal"] == len(verdicts) - 1 + sum(v.op == "residual norm" for v in verdicts)
        again = run(wan, "wan22_i2v", device)
        assert again.waits["aten::equal"] == 0
        assert wan_patches.status().verdicts == verdicts
        wan_patches.disable()
        wan_patches.enable()
        assert run(wan, "wan22_i2v", device).waits["aten::equal"] == 0  # a toggle forgets nothing


def test_rope_is_stacked_after_first_sight(wan, device, monkeypatch):
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:

        def count(*args: Any) -> torch.Tensor:
            calls[name] += 1
            return function(*args)

        return count

    for name, owner, attribute in (
        ("stacked", rope.by_stacking, "function"),
        ("reference", rope.apply_rotary_emb, "reference"),
        ("complex_rows", rope.complex_rows, "function"),
    ):
        monkeypatch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    stock = run(wan, "wan22_i2v", device)
    assert not calls
    with wan_patches.enabled(["rope"]):
        run(wan, "wan22_i2v", device)
        assert [verdict.op for verdict in wan_patches.status().verdicts] == ["rotary embedding"]
        assert calls["reference"] == 1
        calls.clear()
        patched = run(wan, "wan22_i2v", device)
    rotations = 2 * 2 * 2 * 2  # queries and keys, layers, steps, with and without the prompt
    assert calls == {"stacked": rotations}
    assert patched.ops["aten::cat"] - stock.ops["aten::cat"] == rotations
    assert np.array_equal(stock.frames, patched.frames)


def inexact(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rounds once less than stock."""
    first, second = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return (pairs.flatten(-2) * (1 + 2**-9)).type_as(x)


def raising(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(inexact, "differs from the stock formulation"), (raising, "raised NotImplementedError: no such kernel")],
)
def test_the_gate_catches_a_wrong_implementation(wrong, reason, wan, device, monkeypatch, caplog):
    stock = run(wan, "wan22_i2v", device)
    monkeypatch.setattr(rope.by_stacking, "function", wrong)
    with wan_patches.enabled(["rope"]), caplog.at_level(logging.WARNING, "wan_patches"):
        for more in ({}, {}, {"frames": 5}):  # of two lengths, so of two kinds
            run(wan, "wan22_i2v", device, **more)
        patched = run(wan, "wan22_i2v", device)
        status = wan_patches.status()
    assert np.array_equal(stock.frames, patched.frames)
    assert [verdict.op for verdict in status.verdicts] == ["rotary embedding", "rotary embedding"]
    assert {(verdict.exact, verdict.reason) for verdict in status.verdicts} == {(False, reason)}
    assert f"gate: rotary embedding, stack + flatten: not used, {reason} (2 kinds of input)" in str(
        replace(status, verbose=True)
    )
    warnings = [record.getMessage() for record in caplog.records if record.name == "wan_patches"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"rotary embedding: stack + flatten {reason}; another is used")


def test_without_the_gate_a_wrong_implementation_goes_unnoticed(wan, device, monkeypatch):
    """What the gate is for, and that `gate=False` takes it away."""
    stock = run(wan, "wan22_i2v", device)
    monkeypatch.setattr(rope.by_stacking, "function", inexact)
    with wan_patches.enabled(["rope"], gate=False):
        patched = run(wan, "wan22_i2v", device)
        assert wan_patches.status().verdicts == ()
    assert not np.array_equal(stock.frames, patched.frames)
    monkeypatch.setattr(rope.by_stacking, "function", raising)
    rope.apply_rotary_emb.forget()
    with wan_patches.enabled(["rope"], gate=False):  # what raises is not used all the same
        assert np.array_equal(stock.frames, run(wan, "wan22_i2v", device).frames)


def test_without_the_gate_nothing_is_computed_twice(wan, device):
    stock = run(wan, "wan22_i2v", device)
    with wan_patches.enabled(gate=False):
        first = run(wan, "wan22_i2v", device)
        assert wan_patches.status().verdicts == ()
    assert np.array_equal(stock.frames, first.frames)
    assert first.waits["aten::equal"] == 0


def test_a_batch_of_two(wan, device):
    more = {"prompt": ["a fox", "a hare"], "negative_prompt": ["", ""], "output_type": "pil"}
    stock = run(wan, "wan22_i2v", device, **more)
    with wan_patches.enabled():
        assert np.array_equal(stock.frames, run(wan, "wan22_i2v", device, **more).frames)
        assert all(verdict.exact for verdict in wan_patches.status().verdicts)


@pytest.mark.parametrize("name", [name for name in ("wan22_i2v", "helios_i2v") if name in EXPECTED])
def test_other_dtypes(name, device):
    pipe = FAMILIES[name].build(dtype=torch.float16, vae_dtype=torch.bfloat16).to("npu")
    stock = run(pipe, name, device)
    with wan_patches.enabled():
        assert np.array_equal(stock.frames, run(pipe, name, device).frames)
        assert all(verdict.exact for verdict in wan_patches.status().verdicts)


def test_training_on_the_device_takes_the_torch_formulation_without_the_gate(device, monkeypatch):
    """Forward only: autograd counts the devices at its first use in a process, which is before this one is there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 2, 32, generator=generator).to("npu")
    angles = torch.rand(1, 24, 1, 16, generator=generator).to("npu")
    tables = angles.cos(), angles.sin()
    exact = rope.apply_rotary_emb.reference(x, *tables)
    monkeypatch.setattr(rope.apply_rotary_emb, "reference", raising)
    device.reset()
    out = rope.apply_rotary_emb(x.requires_grad_(), *tables)
    assert device.waits().total() == 0
    assert wan_patches.status().verdicts == ()
    assert out.requires_grad
    assert torch.equal(out.detach(), exact)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload_brings_each_part_to_the_device_with_the_same_bits(how, device):
    pipe = FAMILIES["wan22_i2v"].build(dtype=torch.bfloat16)
    getattr(pipe, how)(device="npu")
    stock = run(pipe, "wan22_i2v", device)
    assert stock.uploads.total() > 100  # the weights went there
    with wan_patches.enabled():
        run(pipe, "wan22_i2v", device)
        patched = run(pipe, "wan22_i2v", device)
        assert {verdict.op for verdict in wan_patches.status().verdicts} >= {"rotary embedding", "condition mask"}
    assert np.array_equal(stock.frames, patched.frames)
    assert patched.uploads[MASK_BYTES] == stock.uploads[MASK_BYTES] - 1


def test_group_offload_brings_each_layer_to_the_device_with_the_same_bits(device):
    pipe = FAMILIES["wan22_i2v"].build(dtype=torch.bfloat16)
    for model in (pipe.transformer, pipe.transformer_2):
        model.enable_group_offload(onload_device=torch.device("npu"), offload_type="leaf_level")
    for part in (pipe.vae, pipe.text_encoder):
        part.to("npu")
    stock = run(pipe, "wan22_i2v", device)
    with wan_patches.enabled():
        patched = run(pipe, "wan22_i2v", device)
        assert "rotary embedding" in {verdict.op for verdict in wan_patches.status().verdicts}
    assert np.array_equal(stock.frames, patched.frames)
