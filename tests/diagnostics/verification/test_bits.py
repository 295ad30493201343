from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from wan_patches.diagnostics.verification import bits
from wan_patches.diagnostics.verification.bits import Difference, difference, digest, psnr, ssim


def next_up(tensor, steps=1):
    for _ in range(steps):
        tensor = torch.nextafter(tensor, torch.full_like(tensor, math.inf))
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_differences_are_measured_in_units_in_the_last_place(dtype):
    values = torch.tensor([-1.5, -1e-6, 0.0, 1e-6, 3.0], dtype=torch.float32).to(dtype)
    for index in range(5):
        other = values.clone()
        other[index] = next_up(next_up(other[index]))
        found = difference(values, other)
        assert not found.exact
        assert found.max_ulp == 2
        assert found.max_abs == (other.double() - values.double()).abs().max()


def test_zero_and_minus_zero_differ_in_bits_at_distance_zero():
    found = difference(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert found == Difference(False, 0.0, 0)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_nan_equals_nan_but_no_number():
    nan = torch.tensor([1.0, math.nan])
    assert difference(nan, nan.clone()).exact
    assert difference(nan, torch.ones(2)).reason == "nan on one side only"


@pytest.mark.parametrize(
    ("stock", "patched", "reason"),
    [
        (torch.zeros(2), torch.zeros(3), "shape (2,) in stock, (3,) patched"),
        (torch.zeros(2), torch.zeros(2).double(), "float32 in stock, float64 patched"),
        ([torch.zeros(2)], [torch.zeros(2)] * 2, "1 tensors in stock, 2 patched"),
    ],
)
def test_incomparable_results_have_a_reason(stock, patched, reason):
    assert difference(stock, patched) == Difference(False, reason=reason)
    assert digest(stock) != digest(patched)


def test_nested_results_are_compared():
    def result(last):
        return {"frames": [[Image.new("RGB", (2, 2), last)]], "more": (np.ones(3), torch.ones(2, dtype=torch.bool))}

    assert digest(result("red")) == digest(result("red"))
    assert digest(result("red")) != digest(result("blue"))
    assert difference(result("red"), result("blue")).max_abs == 255
    assert digest({"nothing": None, "to": "compare"}) is None


def test_strides_are_ignored():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert digest(tensor.T.contiguous().T) == digest(tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_condensing_on_the_device_detects_changed_bits_and_order(dtype, monkeypatch):
    monkeypatch.setattr(bits, "_CHUNK", 1 << 10)
    bits._weights.cache_clear()
    values = torch.arange(3000).to(dtype)

    def condensed(tensor):
        return bits._condensed(bits._words(tensor)).tolist()

    swapped, changed = values.clone(), values.clone()
    swapped[[2001, 2030]] = swapped[[2030, 2001]]
    changed[2999] += 1 if dtype == torch.uint8 else 16
    assert condensed(values) == condensed(values.clone())
    assert len({str(condensed(tensor)) for tensor in (values, swapped, changed)}) == 3
    bits._weights.cache_clear()


def test_psnr_matches_its_definition():
    frame = np.zeros((4, 4, 3), np.uint8)
    assert psnr(frame, frame, 255) == math.inf
    assert psnr(frame, frame + 255, 255) == 0
    assert psnr(frame.astype(np.float32), frame + np.float32(0.1), 1) == pytest.approx(20, abs=1e-4)


def test_ssim_is_one_only_for_identical_frames():
    frame = np.random.default_rng(0).random((16, 12, 3), dtype=np.float32)
    assert ssim(frame, frame, 1) == 1
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    assert 0.5 < ssim(frame, frame + np.float32(0.01), 1) < 1
    assert ssim(frame, 1 - frame, 1) < 0.5
    assert ssim(frame[:5, :4], 1 - frame[:5, :4], 1) < 0.5  # smaller than the usual window
