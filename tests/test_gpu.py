"""On an NVIDIA GPU, stock against patched, whole pipelines and single operations: `pytest -m gpu`.

On the emulated device (`tests/emulated_device/test_kernels.py`) only the operations, with few tokens.
"""

from __future__ import annotations

import importlib
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wan_patches
from wan_patches.ops import rope
from wan_patches.patching.codeswap import stock as stock_of
from wan_patches.patching.fidelity import gate
from wan_patches.testing.families import FAMILIES, available

IS_EMULATED = hasattr(torch, "emulated")
DEVICE = "emulated" if IS_EMULATED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (IS_EMULATED or torch.cuda.is_available()), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_final_videos_are_bit_identical(name, dtype, output_type):
    family = FAMILIES[name]
    pipe = family.build(dtype=dtype).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)

    def run():
        torch.manual_seed(0)
        generator = torch.Generator(DEVICE).manual_seed(0)
        return pipe(**family.inputs(generator=generator, output_type=output_type)).frames

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        first, stock = run(), run()
        if not _same(first, stock):
            pytest.skip("two stock runs differ here")
        with wan_patches.enabled():
            patched = [run(), run()]  # at first sight, and after it
            verdicts = wan_patches.status().verdicts
    assert all(_same(stock, video) for video in patched)
    assert all(verdict.exact for verdict in verdicts), verdicts


def _same(a, b):
    if isinstance(a, list):
        return all(x.tobytes() == y.tobytes() for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))
    return np.array_equal(a, b)


# Operations at the shapes of the published models, 480x832x81 and 720x1280x81

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 32760, 12, 128), (1, 32760, 40, 128), (2, 8190, 24, 128), (1, 75600, 40, 128), (1, 517, 5, 44)]
KINDS = ["one", "each", "two"]


def tokens(count):
    """As many, or as few as an interpreter can take."""
    return min(count, 9) if IS_EMULATED else count


@pytest.fixture
def fresh_gate():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    gate.reset()
    yield
    gate.reset()


def _identical(ours, stock):
    assert (ours.dtype, ours.shape, ours.stride()) == (stock.dtype, stock.shape, stock.stride())
    assert torch.equal(ours, stock)


def _stock_rotation(x, cos, sin):
    wan = importlib.import_module("diffusers.models.transformers.transformer_wan")
    code = stock_of(wan.WanAttnProcessor.__call__).__code__
    nested = next(c for c in code.co_consts if getattr(c, "co_name", "") == "apply_rotary_emb")
    return types.FunctionType(nested, vars(wan))(x, cos, sin)


def _tables(seq, dim, batch=1):
    angles = torch.rand(batch, seq, 1, dim // 2, device=DEVICE) * 100
    full = angles.repeat_interleave(2, dim=-1)
    return full.cos(), full.sin()


def _verdicts_are_exact(*ops):
    assert {verdict.op for verdict in gate.verdicts()} == set(ops)
    assert all(verdict.exact for verdict in gate.verdicts()), gate.verdicts()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "fused", "permuted"])
@torch.no_grad()
def test_rotary_embedding_has_the_bits_of_stock(shape, dtype, layout, fresh_gate):
    batch, seq, heads, dim = shape = shape[0], tokens(shape[1]), *shape[2:]
    if layout == "fused":
        query, key, _ = torch.randn(batch, seq, 3 * heads * dim, device=DEVICE, dtype=dtype).chunk(3, dim=-1)
        query, key = query.unflatten(2, (heads, -1)), key.unflatten(2, (heads, -1))
    elif layout == "permuted":
        query, key = torch.randn(2, batch, heads, seq, dim, device=DEVICE, dtype=dtype).transpose(2, 3)
    else:
        query, key = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
    cos, sin = _tables(seq, dim, batch)
    halves = cos[..., 0::2], sin[..., 1::2]
    stock = _stock_rotation(query, cos, sin), _stock_rotation(key, cos, sin)
    for _ in range(2):  # at first sight, and after it
        for ours, theirs in zip(rope.apply_rotary_emb_qk(query, key, *halves), stock):
            _identical(ours, theirs)
        _identical(rope.apply_rotary_emb(query, *halves), stock[0])
    _verdicts_are_exact("rotary embedding", "rotary embedding of queries and keys")


@torch.no_grad()
def test_rotary_embedding_of_helios_has_the_bits_of_stock(fresh_gate):
    helios = pytest.importorskip("diffusers.models.transformers.transformer_helios")
    seq = tokens(12285)
    x = torch.randn(2, seq, 40, 128, device=DEVICE, dtype=torch.bfloat16)
    for batch in (1, 2):
        table = torch.cat(_tables(seq, 128, batch), dim=-1).squeeze(2)
        stock = helios.apply_rotary_emb_transposed(x, table)
        with wan_patches.enabled(["rope"]):
            for _ in range(2):
                _identical(helios.apply_rotary_emb_transposed(x, table), stock)
    _verdicts_are_exact("rotary embedding")


@torch.no_grad()
def test_rotary_embedding_is_captured_in_a_graph(fresh_gate):
    query, key = torch.randn(2, 1, 4095, 12, 128, device=DEVICE, dtype=torch.bfloat16)
    cos, sin = _tables(4095, 128)
    stock = _stock_rotation(query, cos, sin), _stock_rotation(key, cos, sin)
    rope.apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])  # first sight, where nothing is captured
    rope.apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope.apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])
    graph.replay()
    for ours, theirs in zip(captured, stock):
        _identical(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@torch.no_grad()
def test_kernels_run_on_the_device_of_their_input(fresh_gate):
    query, key = torch.randn(2, 1, 4095, 12, 128, device="cuda:1", dtype=torch.bfloat16)
    cos, sin = (table.to("cuda:1") for table in _tables(4095, 128))
    assert torch.cuda.current_device() == 0
    stock = _stock_rotation(query, cos, sin)
    for _ in range(2):
        _identical(rope.apply_rotary_emb_qk(query, key, cos[..., 0::2], sin[..., 1::2])[0], stock)
    _verdicts_are_exact("rotary embedding of queries and keys")


def _rows(kind, seq, dim):
    """Rows of one kind, the split_index, and the same for every token."""
    rows = torch.randn(1, {"one": 1, "each": seq, "two": 2}[kind], 6, dim, device=DEVICE)[:, :, 2]
    split_index = seq // 3 if kind == "two" else None
    counts = torch.tensor([split_index, seq - split_index], device=DEVICE) if split_index else None
    return rows, split_index, rows if counts is None else rows.repeat_interleave(counts, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "seq", "dim"), [(1, 32760, 5120), (2, 8190, 1536), (1, 27280, 3072), (1, 33, 1100)])
@torch.no_grad()
def test_modulation_and_residuals_have_the_bits_of_stock(batch, seq, dim, kind, dtype, fresh_gate):
    from wan_patches.ops.triton.modulation import add_and_cast, gated_residual, modulate

    seq = tokens(seq)
    x, y = torch.randn(2, batch, seq, dim, device=DEVICE, dtype=dtype)
    normed = F.layer_norm(x.float(), (dim,))
    scale, split_index, dense_scale = _rows(kind, seq, dim)
    shift, _, dense_shift = _rows(kind, seq, dim)
    _identical(modulate(normed, scale, shift, dtype, split_index), (normed * (1 + dense_scale) + dense_shift).to(dtype))
    _identical(gated_residual(x, y, scale, split_index), (x.float() + y.float() * dense_scale).to(dtype))
    if dtype != torch.float32:
        total, wide = add_and_cast(x, y)
        _identical(total, x + y)
        _identical(wide, (x + y).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("batch", "seq", "dim"), [(1, 32760, 5120), (2, 8190, 1536), (1, 27280, 3072), (1, 33, 512)])
@torch.no_grad()
def test_norms_in_one_pass_have_the_bits_of_torch(batch, seq, dim, affine, kind, dtype, fresh_gate):
    from wan_patches.ops.triton.layer_norm import layer_norm_modulate, residual_layer_norm_modulate

    seq = tokens(seq)
    x, y = torch.randn(2, batch, seq, dim, device=DEVICE, dtype=dtype) * 3 + 1
    weight, bias = torch.randn(2, dim, device=DEVICE) if affine else (None, None)
    (gate_, split_index, dense_gate), (scale, _, dense_scale) = (_rows(kind, seq, dim) for _ in range(2))
    expected = (x.float() + y.float() * dense_gate).to(dtype)
    normed = F.layer_norm(expected.float(), (dim,), weight, bias, 1e-6)
    h, modulated = residual_layer_norm_modulate(x, y, gate_, weight, bias, scale, gate_, 1e-6, split_index)
    _identical(h, expected)
    _identical(modulated, (normed * (1 + dense_scale) + dense_gate).to(dtype))
    _identical(layer_norm_modulate(h, weight, bias, None, None, 1e-6), normed.to(dtype))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="before torch 2.9 the RMS norm has another order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("batch", "seq", "heads"), [(1, 32760, 40), (2, 8190, 12), (1, 27280, 24), (1, 33, 4)])
@torch.no_grad()
def test_rms_norm_and_rotation_in_one_pass_have_the_bits_of_stock(batch, seq, heads, fused, dtype, fresh_gate):
    from wan_patches.ops.triton.rms_norm import rms_norm_rope

    dim, seq = heads * 128, tokens(seq)
    x = torch.randn(batch, seq, 3 * dim if fused else dim, device=DEVICE, dtype=dtype)
    x, weight = x[..., :dim], torch.randn(dim, device=DEVICE).to(dtype)
    cos, sin = _tables(seq, 128)
    stock = _stock_rotation(F.rms_norm(x, (dim,), weight, 1e-6).unflatten(2, (heads, -1)), cos, sin)
    _identical(rms_norm_rope(x, weight, 1e-6, cos[..., 0::2], sin[..., 1::2], heads), stock)


def _error(found, exact):
    return (found.double() - exact).abs().mean().item()


@pytest.mark.parametrize("dtype", DTYPES[:2] if IS_EMULATED else DTYPES)  # an interpreter adds up in a worse order
@pytest.mark.parametrize("dim", [1536, 3072, 5120])
@torch.no_grad()
def test_close_kernels_are_no_further_from_fp64_than_stock(dim, dtype, fresh_gate):
    from wan_patches.ops.triton.close import residual_layer_norm_modulate, rms_norm_rope

    seq, heads, errors = tokens(2048), dim // 128, []
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 1, seq, dim, device=DEVICE, dtype=dtype)
        gate_, scale, shift = torch.randn(3, 1, 1, dim, device=DEVICE) * 0.5
        weight = (1 + 0.3 * torch.randn(dim, device=DEVICE)).to(dtype)
        cos, sin = (half.contiguous() for half in (table[..., 0::2] for table in _tables(seq, 128)))

        h, normed = residual_layer_norm_modulate(x, y, gate_, None, None, scale, shift, 1e-6)
        assert torch.equal(h, (x.float() + y.float() * gate_).to(dtype))
        exact = F.layer_norm(h.double(), (dim,), eps=1e-6) * (1 + scale.double()) + shift.double()
        stock = (F.layer_norm(h.float(), (dim,), eps=1e-6) * (1 + scale) + shift).to(dtype)
        errors.append((_error(normed, exact), _error(stock, exact)))

        exact = F.rms_norm(x.double(), (dim,), weight.double(), 1e-6).unflatten(2, (heads, -1))
        exact = rope.apply_rotary_emb.reference(exact, cos.double(), sin.double())
        stock = rope.apply_rotary_emb.reference(F.rms_norm(x, (dim,), weight, 1e-6).unflatten(2, (heads, -1)), cos, sin)
        errors.append((_error(rms_norm_rope(x, weight, 1e-6, cos, sin, heads), exact), _error(stock, exact)))
    for kernel in (errors[0::2], errors[1::2]):
        ours, theirs = map(sum, zip(*kernel))
        assert ours <= 1.01 * theirs, ours / theirs


@pytest.mark.parametrize("name", [name for name in available() if "step_loop" not in FAMILIES[name].without])
def test_the_host_does_not_wait_in_a_step(name):
    """Counted by CUDA's own debug mode, as the difference of two runs; waits inside a library's kernels do not show."""
    family = FAMILIES[name]
    pipe = family.build(dtype=torch.bfloat16).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)

    def waits(steps):
        torch.manual_seed(0)
        generator = torch.Generator(DEVICE).manual_seed(0)
        call = family.inputs(steps=steps, generator=generator, output_type="latent")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                pipe(**call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)

    stock = waits(6) - waits(3)
    with wan_patches.enabled():
        waits(6), waits(3)  # at first sight, and what is uploaded once
        patched = waits(6) - waits(3)
    assert patched == 0, f"{patched} in three steps; stock {stock}"
    assert stock > 0 or name.startswith("sana")
