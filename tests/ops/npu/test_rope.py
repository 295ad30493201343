"""`npu_rotary_mul` with a stand-in: the bits of the plain formulation, and no call beyond its documented limits."""

from __future__ import annotations

import sys

import pytest
import torch

from wan_patches.ops import npu
from wan_patches.ops import rope as op
from wan_patches.ops.npu import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch=1, seq=6, heads=3, dim=8, dtype=torch.bfloat16, tables=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seq, heads, dim, generator=generator).to(dtype)
    angles = torch.rand(tables, seq, 1, dim // 2, generator=generator) * 6
    full = [angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)]
    return x, full[0][..., 0::2], full[1][..., 1::2]  # views, as the patch hands them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [{}, {"batch": 2}, {"dim": 2}, {"dim": 128, "heads": 12}, {"seq": 1}])
def test_same_bits_as_the_plain_formulation(shape, dtype, torch_npu_stand_in):
    given = inputs(dtype=dtype, **shape)
    assert rope.why_not(*given) is None
    ours, plain = rope.rotary_mul(*given), op.apply_rotary_emb.reference(*given)
    assert torch.equal(ours, plain)
    assert ours.dtype == plain.dtype
    assert ours.stride() == plain.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_part_of_a_fused_projection(dtype, torch_npu_stand_in):
    x, cos, sin = inputs(heads=4, dtype=dtype)
    x = torch.cat([x, x + 1, x - 1], dim=2)[:, :, 4:8]
    assert not x.is_contiguous()
    assert rope.why_not(x, cos, sin) is None
    ours, plain = rope.rotary_mul(x, cos, sin), op.apply_rotary_emb.reference(x, cos, sin)
    assert torch.equal(ours, plain)
    assert ours.stride() == plain.stride()


@pytest.mark.parametrize(
    "given",
    [
        inputs(batch=2, tables=2),  # a table for each of the batch
        inputs(batch=100, heads=10),
        inputs(dim=896),
        inputs(dtype=torch.float64),
        (inputs()[0][0], *inputs()[1:]),
        (inputs()[0], *(table.bfloat16() for table in inputs()[1:])),
        (inputs()[0], *(table.double() for table in inputs()[1:])),
        (inputs()[0], inputs()[1], inputs(seq=1)[2]),
        (inputs()[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs()[1:]),  # stock keeps that order of axes
    ],
    ids=["batch of tables", "B*N", "D", "fp64", "3-D", "bf16 tables", "fp64 tables", "one token", "other strides"],
)
def test_input_beyond_the_limits_is_refused(given, torch_npu_stand_in):
    assert rope.why_not(*given)


def test_odd_head_dim_is_refused(torch_npu_stand_in):
    x, cos, sin = inputs()
    assert rope.why_not(x[..., :7], cos[..., :3], sin[..., :3])


def test_stand_in_rejects_input_beyond_the_limits(torch_npu_stand_in):
    """Or the tests above would prove nothing."""
    for shape in ({"batch": 100, "heads": 10}, {"dim": 896}):
        with pytest.raises(RuntimeError, match="stand-in"):
            rope.rotary_mul(*inputs(**shape))
    x, cos, sin = inputs()
    with pytest.raises(RuntimeError, match="mixed dtypes"):
        torch_npu_stand_in.npu_rotary_mul(x, cos, sin, "interleave")


@pytest.mark.parametrize(
    ("module", "reason"),
    [(None, "ModuleNotFoundError: import of torch_npu halted"), (sys, "AttributeError: module 'sys' has no attribute")],
    ids=["missing", "without the operation"],
)
def test_unusable_torch_npu_is_reported_in_a_line(module, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    npu.forget()
    assert rope.why_not(*inputs())
    (line,) = npu.problems()
    assert line.startswith(f"torch_npu.npu_rotary_mul cannot be used, other formulations run: {reason}")
    npu.forget()
    assert not npu.problems()


def test_other_errors_of_importing_torch_npu_are_reported_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('libhccl.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    npu.forget()
    assert rope.why_not(*inputs())
    assert npu.problem("torch_npu:npu_rotary_mul") == "RuntimeError: libhccl.so: no such file"
    npu.forget()


def test_tensors_on_other_devices_import_no_torch_npu(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    npu.forget()
    op.apply_rotary_emb(*inputs())
    assert not npu.problems()
