"""The kernel in Triton's interpreter, which runs on CPUs and cuts digits off where it stores bf16: not tried here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# Triton decides at import whether it interprets
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from wan_patches.ops.triton.norm_silu import norm_silu

torch.manual_seed(0)
with torch.no_grad():
    for dtype in (torch.float32, torch.float16):
        for shape, bias, order in (
            ((2, 12, 3, 9, 11), False, (0, 1, 2, 3, 4)),
            ((1, 5, 1, 40, 41), True, (0, 1, 2, 3, 4)),
            ((2, 8, 2, 6, 7), False, (0, 2, 1, 3, 4)),
        ):
            norm = WanRMS_norm(shape[1], images=False, bias=bias)
            for parameter in norm.parameters():
                parameter.normal_()
            norm.to(dtype)
            x = torch.randn(shape).to(dtype).permute(order).contiguous().permute(order)
            x[0, :, 0, 0] = -0.0
            x[0, 0, 0, 1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            wide = x.float() if FP32 else x
            length = wide.norm(2, 1, keepdim=True).contiguous()
            expected = norm(x)
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            known = ~expected.isnan()
            for kept in (0, 1, shape[2]):
                window = torch.full((*shape[:3], shape[3] + 2, shape[4] + 4), 7.0, dtype=dtype)
                inner = window[..., 1:-1, 2:-2]
                last = torch.full((shape[0], shape[1], kept + 1, *shape[3:]), 7.0, dtype=dtype)
                arguments = (x, length, norm.scale, norm.gamma, norm.bias if bias else None, inner)
                norm_silu(*arguments, last[:, :, 1:] if kept else None, silu=False)
                assert torch.equal(inner.isnan(), ~known)
                assert torch.equal(inner[known].view(integer), expected[known].view(integer)), (dtype, shape)
                assert torch.equal(last[:, :, 1:].nan_to_num(), inner[:, :, shape[2] - kept :].nan_to_num())
                assert (last[:, :, 0] == 7).all()
                inner.fill_(7)
                assert (window == 7).all()
            norm_silu(*arguments)
            # the interpreter's exponential is another than ATen's
            close = {"rtol": 2e-3 if dtype == torch.float16 else 2e-6, "atol": 1e-7, "equal_nan": True}
            torch.testing.assert_close(inner, F.silu(expected), **close)
print("ok")
"""


def test_norm_is_bit_identical_to_stock_and_silu_close():
    import inspect

    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    fp32 = ".float()" in inspect.getsource(WanRMS_norm.forward)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("FP32", str(fp32))],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float16"])
def test_compiled_kernel_rounds_as_stock_and_loads_sixteen_bytes(kind, capability, compiled):
    """Compiled, not run: no GPU is needed."""
    from wan_patches.ops.triton import norm_silu

    x = torch.empty(1, 96, 4, 32, 48, dtype=getattr(torch, kind))
    window, last = torch.empty(1, 96, 6, 34, 50, dtype=x.dtype), torch.empty_like(x[:, :, :2])
    arguments = x, torch.empty(1, 1, *x.shape[2:]), 1.5, x[0, :, 0, 0, 0].clone(), None

    def call(silu):
        norm_silu.norm_silu(*arguments, window[:, :, 2:, 1:-1, 1:-1], last, silu=silu)

    ptx = compiled(norm_silu, "_kernel", lambda: call(False), capability).asm["ptx"]
    # sm_80 has only this for bf16: products are added to -0, sums have a factor of one
    minus_zero, one = (set(re.findall(rf"mov.b16\s+(%rs\d+), {bits};", ptx)) for bits in ("0x8000", "0x3F80"))
    adding = [line.split("%", 1)[1] for line in ptx.splitlines() if "fma." in line]
    assert capability == 80 or not adding
    for line in adding:
        _, *factors, term = re.findall(r"%rs\d+", f"%{line}")
        assert term in minus_zero or one & set(factors)
    assert "div.rn" in ptx
    assert "div.full" not in ptx
    assert ptx.count("ld.global.v4") == 2 * (8 // (16 // x.itemsize)) + (x.itemsize == 2)
    assert ptx.count("st.global.v4") == 8 // (16 // x.itemsize)  # the last frames: rows of the window are not aligned
    built = compiled(norm_silu, "_kernel", lambda: call(True), capability)
    assert not re.search(r"\b(?:LDL|STL)\b", built.asm["sass"])
