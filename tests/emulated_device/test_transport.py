"""Tensors of an accelerator through a channel: straight into shared memory, in pieces through pinned memory."""

from __future__ import annotations

import pytest
import torch

from wan_patches.executor import packing
from wan_patches.executor.transport import Channel, pack

pytestmark = pytest.mark.npu_emulated


@pytest.fixture
def ends():
    ours, theirs = Channel.pair()
    theirs = Channel(theirs, device=torch.device("npu"))
    yield theirs, ours
    ours.close()
    theirs.close()


def cases() -> dict[str, torch.Tensor]:
    video = torch.randn(1, 3, 9, 64, 96)
    return {
        "float32": video,
        "bfloat16": video.to(torch.bfloat16),
        "uint8": (video * 50 + 128).to(torch.uint8),
        "permuted": video.permute(0, 2, 3, 4, 1),
        "strided": video[..., ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("name", cases())
def test_a_tensor_arrives_on_the_cpu_with_one_download(name, ends, device):
    sender, receiver = ends
    expected = cases()[name]
    tensor = expected.to("npu")
    device.reset()
    sender.send("value", value=pack({"it": tensor}))
    downloads = device.downloads()
    got = receiver.recv().load()["it"]
    assert got.device.type == "cpu"
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert sum(size * count for size, count in downloads.items()) == expected.nbytes
    assert sum(downloads.values()) == bool(expected.nbytes)


def test_a_large_tensor_goes_in_pieces(ends, device, monkeypatch):
    monkeypatch.setattr(packing, "_STAGING", 100_000)
    sender, receiver = ends
    expected = torch.arange(250_000, dtype=torch.int16)
    tensor = expected.to("npu")
    device.reset()
    sender.send("value", value=pack(tensor))
    assert device.downloads() == {100_000: 5}
    assert torch.equal(receiver.recv().load(), expected)
