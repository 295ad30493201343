"""Whole pipelines on an emulated NPU with a stand-in for torch_npu: its documented arithmetic and limits, in torch.

Neither is the real thing. What is shown is that calls keep within what is documented and that the gates keep what they
promise; nothing about how an NPU rounds, or how fast it is.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wan_patches
from wan_patches.ops import fused_norm, npu, rope
from wan_patches.ops.npu import attention, norms
from wan_patches.patching.fidelity import Fidelity
from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.npu_emulated

# stock's diffusion forcing copies tensors in a way that the emulation cannot follow
THERE = [name for name in available() if not name.startswith("skyreels_v2_df") and "rope" not in FAMILIES[name].without]

NPU_OP, TORCH_OP = "npu_rotary_mul", "stack + flatten"


def frames(pipe: Any, name: str, **more: Any) -> np.ndarray:
    torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
    if name == "wan_t2v":
        more = {"frames": 5, "steps": 1, **more}
    video = np.asarray(pipe(**FAMILIES[name].inputs(**more)).frames)
    assert np.isfinite(video).all()
    assert video.std() > 0
    return video


@pytest.fixture(scope="module")
def built(_device: Any) -> dict[Any, Any]:
    return {}


@pytest.fixture
def build(built: dict[Any, Any], device: Any) -> Any:
    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        if (name, dtype) not in built:
            built[name, dtype] = FAMILIES[name].build(dtype=dtype).to("npu")
        return built[name, dtype]

    return make


@pytest.fixture
def calls(torch_npu_stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of the stand-in is called, and the formulations in torch."""
    made: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            made["stacked" if name in ("function", "traced") else name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    for name in ("npu_rotary_mul", "npu_rms_norm", "npu_layer_norm_eval", "npu_fusion_attention", "attention_forward"):
        counted(torch_npu_stand_in, name)
    counted(rope.by_stacking, "function")
    counted(rope.apply_rotary_emb, "traced")
    counted(rope.apply_rotary_emb, "reference")
    npu.forget()
    return made


def verdicts() -> set[tuple[str, bool]]:
    found = wan_patches.status().verdicts
    return {(verdict.form, verdict.exact) for verdict in found if verdict.op == "rotary embedding"}


# Rotary embedding


@pytest.mark.loop("wan_t2v", "wan22_i2v", "wan_vace", "skyreels_v2_df", "chronoedit", "sana_video", "helios_i2v")
@pytest.mark.parametrize("name", THERE)
def test_every_family_keeps_its_bits_and_its_rotary_embedding_is_npu_rotary_mul(name, build, calls):
    pipe = build(name)
    stock = frames(pipe, name)
    assert not calls
    with wan_patches.enabled(["rope"]):
        first = frames(pipe, name)
        judged = verdicts()
        calls.clear()
        again = frames(pipe, name)
        assert verdicts() == judged
        skipped = [r for r in wan_patches.status().skipped() if r.name == "rope"]
    assert np.array_equal(stock, first)
    assert np.array_equal(stock, again)
    assert stock.strides == again.strides
    assert all("as complex numbers" in report.reason for report in skipped)
    if any(name.startswith("skyreels") and report.module.endswith("skyreels_v2") for report in skipped):
        return
    assert all(exact for _, exact in judged)
    assert (NPU_OP, True) in judged
    assert calls["npu_rotary_mul"] > 0
    assert calls["npu_rotary_mul"] >= calls["stacked"]  # which has the rotations beyond the limits
    assert calls["reference"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in ("wan_t2v", "helios") if name in available()])
def test_other_dtypes_and_a_batch_of_two_keep_their_bits(name, dtype, build, calls):
    pipe = build(name, dtype)
    for more in ({}, {"prompt": ["a fox", "a hare"], "negative_prompt": ["", ""]}):
        stock = frames(pipe, name, **more)
        with wan_patches.enabled(["rope"]):
            assert np.array_equal(stock, frames(pipe, name, **more))
            assert np.array_equal(stock, frames(pipe, name, **more))
    assert calls["npu_rotary_mul"] > 0
    assert all(exact for _, exact in verdicts())


def test_after_first_sight_there_is_one_call_for_each_rotation_and_no_wait(build, calls, device):
    pipe = build("wan_t2v")
    device.reset()
    frames(pipe, "wan_t2v")
    stock = device.waits()
    with wan_patches.enabled(["rope"]):
        frames(pipe, "wan_t2v")
        calls.clear()
        device.reset()
        frames(pipe, "wan_t2v")
    assert calls == {"npu_rotary_mul": 2 * 2 * 2}  # queries and keys, layers, with and without the prompt
    assert device.waits() == stock


def rounds_otherwise(input: Any, r1: Any, r2: Any, rotary_mode: str = "half", rotate: Any = None) -> torch.Tensor:
    """As an operation that fuses product and sum."""
    x, cos, sin = input.double(), r1.double(), r2.double()
    rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x * cos + rotated * sin).to(input.dtype)


def knows_half_only(*args: Any) -> torch.Tensor:
    """As torch_npu documents it for jit_compile=True."""
    raise RuntimeError("only rotary_mode='half' is supported")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (rounds_otherwise, "differs from the stock formulation"),
        (knows_half_only, "raised RuntimeError: only rotary_mode='half' is supported"),
    ],
)
def test_an_npu_that_rounds_otherwise_or_refuses_gets_the_torch_formulation(
    wrong, reason, build, calls, torch_npu_stand_in, monkeypatch, caplog
):
    pipe = build("wan_t2v", torch.float32)
    stock = frames(pipe, "wan_t2v")
    monkeypatch.setattr(torch_npu_stand_in, "npu_rotary_mul", wrong)
    npu.forget()
    with wan_patches.enabled(["rope"]), caplog.at_level(logging.WARNING, "wan_patches"):
        assert np.array_equal(stock, frames(pipe, "wan_t2v"))
        assert verdicts() == {(NPU_OP, False), (TORCH_OP, True)}
        calls.clear()
        assert np.array_equal(stock, frames(pipe, "wan_t2v"))
        status = wan_patches.status()
    assert calls == {"stacked": 8}  # and not the slow assignments
    assert f"gate: rotary embedding, {NPU_OP}: not used, {reason} (1 kinds of input)" in str(
        replace(status, verbose=True)
    )
    warnings = [record.getMessage() for record in caplog.records if record.name == "wan_patches"]
    assert sum(warning.startswith(f"rotary embedding: {NPU_OP} {reason}; another is used") for warning in warnings) == 1


def test_without_the_gate_such_an_npu_would_change_the_video(build, torch_npu_stand_in, monkeypatch):
    """Or the test above would prove nothing."""
    pipe = build("wan_t2v", torch.float32)
    stock = frames(pipe, "wan_t2v")
    monkeypatch.setattr(torch_npu_stand_in, "npu_rotary_mul", rounds_otherwise)
    with wan_patches.enabled(["rope"], gate=False):
        assert not np.array_equal(stock, frames(pipe, "wan_t2v"))


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_torch_npu_the_torch_formulation_runs_and_status_says_so(broken, build, tmp_path, monkeypatch):
    if broken:  # as without CANN
        (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "torch_npu", None)
    npu.forget()
    pipe = build("wan_t2v")
    stock = frames(pipe, "wan_t2v")
    with wan_patches.enabled(["rope"]):
        assert np.array_equal(stock, frames(pipe, "wan_t2v"))
        assert verdicts() == {(TORCH_OP, True)}
        status = wan_patches.status()
    (line,) = [line for line in status.advice if "npu_rotary_mul" in line]
    assert "torch_npu.npu_rotary_mul cannot be used, other formulations run" in line
    assert ("libhccl.so" if broken else "halted") in line
    assert line in " ".join(str(replace(status, verbose=True)).split())
    npu.forget()


def test_autograd_never_meets_the_operation(device, calls):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 2, 32, generator=generator).to("npu")
    angles = torch.rand(1, 24, 1, 16, generator=generator).to("npu")
    tables = angles.cos(), angles.sin()
    rope.apply_rotary_emb(x.requires_grad_(), *tables)
    assert calls == {"stacked": 1}
    rope.apply_rotary_emb(x.detach(), tables[0].requires_grad_(), tables[1])
    assert calls["npu_rotary_mul"] == 0
    with torch.no_grad():
        rope.apply_rotary_emb(x, *tables)
    assert calls["npu_rotary_mul"] == 1


# Norms


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return (out.cpu().double() - exact).abs().mean().item()


class Norm:
    """What diffusers' `FP32LayerNorm` computes."""

    def __init__(self, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias, self.eps = weight, bias, 1e-6

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        affine = [None if tensor is None else tensor.float() for tensor in (self.weight, self.bias)]
        return F.layer_norm(x.float(), x.shape[-1:], *affine, self.eps).to(x.dtype)


SHAPES = [(1, 70, 1536), (2, 33, 96), (1, 8, 5120), (2, 3, 5, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of_weight", [None, torch.float32, torch.bfloat16])
def test_rms_norm_is_no_less_accurate_than_torch(shape, dtype, of_weight, device, calls):
    for seed in range(4):
        x = draw(*shape, seed=seed, dtype=dtype)
        weight = None if of_weight is None else draw(shape[-1], seed=seed + 100, dtype=of_weight)
        on_npu = None if weight is None else weight.to("npu")
        stock = F.rms_norm(x, shape[-1:], weight, 1e-6)
        norms.rms_norm(x.to("npu"), on_npu, 1e-6)  # first sight gives stock's
        ours = norms.rms_norm(x.to("npu"), on_npu, 1e-6)
        exact = F.rms_norm(x.double(), shape[-1:], None if weight is None else weight.double(), 1e-6)
        assert ours.shape == stock.shape
        assert ours.dtype == stock.dtype == dtype
        assert error(ours, exact) <= 1.01 * error(stock, exact)
    if dtype != torch.float32:  # there the last digits decide, either way
        assert calls["npu_rms_norm"] == 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of_weight", [None, torch.float32, torch.bfloat16])
def test_layer_norm_is_no_less_accurate_than_torch(shape, dtype, of_weight, device, calls):
    for seed in range(4):
        x = draw(*shape, seed=seed, dtype=dtype)
        affine = [None, None] if of_weight is None else [draw(shape[-1], seed=n, dtype=of_weight) for n in (seed, 99)]
        on_npu = [None if tensor is None else tensor.to("npu") for tensor in affine]
        stock = fused_norm.cast_norm(x, Norm(*affine))
        fused_norm.cast_norm(x.to("npu"), Norm(*on_npu))
        ours = fused_norm.cast_norm(x.to("npu"), Norm(*on_npu))
        exact = F.layer_norm(
            x.double(), shape[-1:], *(None if tensor is None else tensor.double() for tensor in affine), 1e-6
        )
        assert ours.shape == stock.shape
        assert ours.dtype == stock.dtype == dtype
        assert error(ours, exact) <= 1.01 * error(stock, exact)
    if dtype != torch.float32:
        assert calls["npu_layer_norm_eval"] == 8


def test_an_operation_that_rounds_inside_is_not_used(device, torch_npu_stand_in, monkeypatch, caplog):
    def rounds_inside(input, gamma, epsilon=1e-06):
        rstd = torch.rsqrt(input.square().mean(-1, keepdim=True) + epsilon)
        return input * rstd * gamma, rstd

    monkeypatch.setattr(torch_npu_stand_in, "npu_rms_norm", rounds_inside)
    x, weight = draw(1, 70, 1536, dtype=torch.bfloat16).to("npu"), draw(1536, seed=1, dtype=torch.bfloat16).to("npu")
    stock = F.rms_norm(x, (1536,), weight, 1e-6)
    with caplog.at_level(logging.WARNING, "wan_patches"):
        for _ in range(2):
            assert torch.equal(norms.rms_norm(x, weight, 1e-6), stock)
    assert not torch.equal(rounds_inside(x, weight)[0], stock)
    (verdict,) = wan_patches.status().verdicts
    assert (verdict.form, verdict.exact, verdict.fidelity) == ("npu_rms_norm", False, Fidelity.CLOSE)
    assert "npu_rms_norm is less accurate than the stock formulation" in caplog.text
    assert "gate: RMS norm by torch_npu, npu_rms_norm: not used, is less accurate" in str(
        wan_patches.status(verbose=True)
    )


def test_one_that_does_not_is_called_close(device, calls):
    x = draw(1, 70, 96, dtype=torch.bfloat16).to("npu")
    fused_norm.cast_norm(x, Norm())
    (verdict,) = wan_patches.status().verdicts
    assert (verdict.form, verdict.exact, verdict.fidelity) == ("npu_layer_norm_eval", True, Fidelity.CLOSE)
    assert "gate: cast norm in one pass, npu_layer_norm_eval: close (1 kinds of input)" in str(
        wan_patches.status(verbose=True)
    )


def test_what_norms_are_not_for_is_torchs_own(device, calls):
    x, weight = draw(1, 6, 32).to("npu"), draw(32, seed=1).to("npu")
    cases = [
        (x.double(), weight, 1e-6),
        (x[0, 0], weight, 1e-6),
        (x, weight, None),
        (x, weight.double(), 1e-6),
        (x[:, :0], weight, 1e-6),
    ]
    for case in cases:
        ours = norms.rms_norm(*case)
        assert torch.equal(ours, F.rms_norm(case[0], (32,), *case[1:]))
    with_grad = x.clone().requires_grad_()
    assert norms.rms_norm(with_grad, weight, 1e-6).requires_grad
    assert fused_norm.cast_norm(with_grad, Norm()).requires_grad
    assert torch.equal(fused_norm.cast_norm(x.double(), Norm()), Norm()(x.float()).double())
    assert not calls


def test_norms_follow_torch_where_torch_npu_is_missing(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    npu.forget()
    x = draw(1, 6, 32, dtype=torch.bfloat16).to("npu")
    assert torch.equal(norms.rms_norm(x, None, 1e-6), F.rms_norm(x, (32,), None, 1e-6))
    assert npu.problem("torch_npu:npu_rms_norm")
    npu.forget()


# Attention


@pytest.fixture
def dispatch(torch_npu_stand_in: Any, calls: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers, as if torch_npu had been there when it was imported."""
    from diffusers.models import attention_dispatch as module

    monkeypatch.setattr(module, "_CAN_USE_NPU_ATTN", True)
    monkeypatch.setattr(
        module, "npu_fusion_attention", lambda *a, **k: torch_npu_stand_in.npu_fusion_attention(*a, **k)
    )
    table = module._AttentionBackendRegistry
    before = table._active_backend
    yield module
    table._active_backend = before


@pytest.fixture
def pipe(build: Any) -> Any:
    pipe = build("wan_t2v")
    yield pipe
    pipe.transformer.reset_attention_backend()


def test_fused_attention_is_named_by_the_user_and_the_patches_keep_its_bits(pipe, dispatch, calls):
    plain = frames(pipe, "wan_t2v")
    pipe.transformer.set_attention_backend("_native_npu")
    fused = frames(pipe, "wan_t2v")
    assert calls["npu_fusion_attention"] == 2 * 2 * 2  # self- and cross-attention, layers, with and without the prompt
    assert np.abs(fused - plain).max() < 0.05  # the same mathematics
    with wan_patches.enabled():
        for _ in range(2):
            assert np.array_equal(frames(pipe, "wan_t2v"), fused)
        assert (NPU_OP, True) in verdicts()
        status = wan_patches.status()
    (line,) = [line for line in status.advice if "attention" in line]
    assert "'_native_npu'" in line


def test_laser_attention_is_named_by_the_user_and_has_long_self_attention(
    pipe, dispatch, calls, torch_npu_stand_in, monkeypatch
):
    plain = frames(pipe, "wan_t2v")
    tokens = 2 * 3 * 2  # latent frames of 4 x 6 pixels, in patches of 2 x 2
    monkeypatch.setattr(attention, "_MIN_TOKENS", tokens)  # too few for MindIE-SD
    monkeypatch.setattr(torch_npu_stand_in, "LASER_TOKENS", tokens)
    with wan_patches.enabled():
        pipe.transformer.set_attention_backend("mindiesd_laser")
        calls.clear()
        laser = frames(pipe, "wan_t2v")
        assert calls["attention_forward"] == 2 * 2  # layers, with and without the prompt
        assert calls["npu_fusion_attention"] == 2 * 2  # cross-attention
    assert np.abs(laser - plain).max() < 0.05
    assert np.array_equal(frames(pipe, "wan_t2v"), laser)  # the choice of the user outlives the patches
    with wan_patches.enabled(["rope"]):
        assert np.array_equal(frames(pipe, "wan_t2v"), laser)


def test_verify_compares_with_stock_under_the_same_attention(pipe, dispatch, calls, torch_npu_stand_in, monkeypatch):
    monkeypatch.setattr(attention, "_MIN_TOKENS", 12)
    monkeypatch.setattr(torch_npu_stand_in, "LASER_TOKENS", 12)
    with wan_patches.enabled():
        pipe.transformer.set_attention_backend("mindiesd_laser")
    calls.clear()
    found = wan_patches.verify(pipe, repeat=0, **FAMILIES["wan_t2v"].inputs(frames=5, steps=1, generator=None))
    assert found.exact, found
    assert calls["attention_forward"] >= 2 * 4  # stock and patched
    assert calls["npu_rotary_mul"] > 0


def test_laser_attention_of_4000_tokens(device, calls):
    given = [draw(1, 4000, 1, 32, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    on_npu = [tensor.to("npu") for tensor in given]
    assert attention.fits(*on_npu)
    assert not attention.fits(*given)
    assert not attention.fits(*(tensor[:, 1:] for tensor in on_npu))
    ours = attention.laser_attention(*on_npu)
    exact = F.scaled_dot_product_attention(*(tensor.double().transpose(1, 2) for tensor in given)).transpose(1, 2)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-2, atol=1e-3)
    assert calls["attention_forward"] == 1


# Norms of close patches


@pytest.mark.parametrize("name", [name for name in ("wan_t2v", "helios") if name in available()])
def test_close_patches_take_the_norms_of_torch_npu(name, build, calls):
    pipe = build(name)
    stock = frames(pipe, name)
    with wan_patches.enabled(["modulation", "qk"]):
        assert np.array_equal(stock, frames(pipe, name))
    assert not calls["npu_rms_norm"]
    with wan_patches.enabled(["modulation", "qk"], fidelity="close"):
        close = frames(pipe, name)
        calls.clear()
        again = frames(pipe, name)
        judged = [verdict for verdict in wan_patches.status().verdicts if verdict.fidelity is Fidelity.CLOSE]
    assert np.array_equal(close, again)
    np.testing.assert_allclose(close, stock, rtol=0, atol=0.1)
    assert {verdict.form for verdict in judged} >= {"npu_rms_norm"}
    assert all(verdict.exact for verdict in judged), judged
    assert calls["npu_rms_norm"] > 0
    assert calls["npu_layer_norm_eval"] > 0
