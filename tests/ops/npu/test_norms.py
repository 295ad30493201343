"""RMS norm and layer norm by torch_npu, as far as CPU tensors go; the rest is in tests/emulated_device."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from wan_patches.ops import npu
from wan_patches.ops.npu import norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_devices_have_the_bits_of_torch_and_import_nothing(dtype, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    npu.forget()
    x, weight = draw(2, 5, 32, dtype=dtype), draw(32, seed=1, dtype=dtype)
    for parameter in (None, weight):
        assert torch.equal(norms.rms_norm(x, parameter, 1e-6), F.rms_norm(x, (32,), parameter, 1e-6))
    assert torch.equal(norms.rms_norm(x, weight), F.rms_norm(x, (32,), weight))
    assert not npu.problems()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weight", [None, *DTYPES])
def test_operands_lose_no_digits_before_the_operation(dtype, of_weight, torch_npu_stand_in, monkeypatch):
    seen = []
    for name in ("npu_rms_norm", "npu_layer_norm_eval"):
        function = getattr(torch_npu_stand_in, name)

        def record(*args, function=function):
            seen.append([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
            return function(*args)

        monkeypatch.setattr(torch_npu_stand_in, name, record)
    x, weight = draw(2, 5, 32, dtype=dtype), None if of_weight is None else draw(32, seed=1, dtype=of_weight)
    outs = [norms._rms_norm(x, weight, 1e-6), norms.layer_norm(x, weight, None, 1e-6)]
    outs.append(norms.layer_norm(x, None, weight, 1e-6))
    widest = dtype if of_weight is None else torch.promote_types(dtype, of_weight)
    assert all(set(dtypes) == {widest} for dtypes in seen)
    assert len(seen) == 3
    for out in outs:
        assert out.dtype == dtype
        assert out.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 64), (1, 33, 1536), (1, 9, 5120), (3, 2, 5, 48)])
def test_the_exact_formulation_is_that_of_torch_in_float64(shape, dtype):
    """What errors are measured against."""
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], seed=1)
    sampled = [norms._sample(tensor) for tensor in (x, weight)]
    every = x.double().flatten(0, -2)[:: max(1, x[..., 0].numel() // norms.SAMPLE)]
    assert torch.equal(sampled[0], every)
    ours = norms._exact_rms_norm(sampled[0], sampled[1], 1e-6)
    torch.testing.assert_close(ours, F.rms_norm(every, shape[-1:], weight.double(), 1e-6), rtol=1e-12, atol=1e-12)
