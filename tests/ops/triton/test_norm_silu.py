"""The kernel in Triton's interpreter, which runs on CPUs and cuts digits off where it stores bf16: not tried here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
            denominator = wide.norm(2, 1, keepdim=True).clamp_min(1e-12).contiguous()
            arguments = (x, denominator, norm.scale, norm.gamma, norm.bias if bias else None)
            normed = norm_silu(*arguments, silu=False)
            expected = norm(x)
            assert normed.dtype == dtype and normed.stride() == x.stride()
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            known = ~expected.isnan()
            assert torch.equal(normed.isnan(), ~known)
            assert torch.equal(normed[known].view(integer), expected[known].view(integer)), (dtype, shape)
            # the interpreter's exponential is another than ATen's
            close = {"rtol": 2e-3 if dtype == torch.float16 else 2e-6, "atol": 1e-7, "equal_nan": True}
            torch.testing.assert_close(norm_silu(*arguments), F.silu(expected), **close)
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


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
def test_compiled_kernel_rounds_as_stock_and_loads_sixteen_bytes(dtype):
    """Compiled, not run: no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from wan_patches.ops.triton import norm_silu

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")
    names = norm_silu._kernel.arg_names
    constants = {"HAS_BIAS": True, "SILU": False, "BLOCK": norm_silu._BLOCK}
    pointers = {"x": dtype, "gamma": dtype, "bias": dtype, "out": dtype, "denominator": "fp32"}
    types = {name: "constexpr" for name in constants} | {name: f"*{kind}" for name, kind in pointers.items()}
    signature = {name: types.get(name, "fp32" if name == "scale" else "i32") for name in names}
    scalars = {*constants, "gamma", "bias", "scale", "channels", "frames"}
    source = ASTSource(
        fn=norm_silu._kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in scalars},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma." not in ptx
    assert "div.rn" in ptx
    assert "div.full" not in ptx
    assert "ld.global.v4" in ptx
