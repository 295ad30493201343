"""Every form of adaLN modulation and of gated residuals against stock's operations, on drawn inputs."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_patches.ops import modulation as ops
from wan_patches.ops.dispatch import at_any_size, rechecking
from wan_patches.ops.modulation import RowPerToken, SegmentedModulation
from wan_patches.patching import tally
from wan_patches.patching.fidelity import gate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 40  # a chunk, in elements


class _Norm:
    weight = bias = None
    eps = 1e-6

    def __call__(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


_norm = _Norm()


@st.composite
def cases(draw):
    """Hidden states, what a layer made of them, and two modulations of one kind."""
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, seq, dim = draw(st.integers(1, 3)), draw(st.integers(1, 23)), draw(st.sampled_from((1, 8, 24, 96)))
    dtype, other = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(("row", "token", "two rows", "made when used")))
    rows = {"row": 1, "token": seq, "two rows": 2, "made when used": seq}[kind]
    split_index = draw(st.integers(0, seq))

    def modulation():
        if kind == "made when used":
            return RowPerToken(torch.randn(1, 3, dim)[:, 1:2], torch.randn(batch, seq, 3, dim).to(other)[:, :, 2])
        tensor = torch.randn(draw(st.sampled_from((1, batch))), 3 * rows, dim)[:, 1::3]  # as `chunk` leaves it
        return SegmentedModulation(tensor, split_index, seq) if kind == "two rows" else tensor

    x = torch.randn(batch, seq, dim).to(dtype)
    if draw(st.booleans()):
        x[0, 0, 0] = draw(st.sampled_from((float("inf"), float("nan"), -0.0, 6e4)))
    return x, torch.randn(batch, seq, dim).to(other), modulation(), modulation()


def _dense(modulation, x):
    """Row by row, unlike the code under test."""
    if isinstance(modulation, RowPerToken):
        return modulation.table + modulation.temb.float()
    if not isinstance(modulation, SegmentedModulation):
        return modulation
    rows = [modulation.rows[:, 0 if token < modulation.split_index else 1] for token in range(x.shape[1])]
    return torch.stack(rows, dim=1)


def _stock_norm(x, scale, shift):
    return (_norm(x.float()) * (1 + _dense(scale, x)) + _dense(shift, x)).type_as(x)


def _stock_residual(x, y, by):
    return (x.float() + y * _dense(by, x)).type_as(x)


def _assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def large(monkeypatch):
    """Small inputs count as large, and fill several chunks."""
    monkeypatch.setattr(ops, "_CHUNK", LARGE)
    with at_any_size(), rechecking():
        yield


def _name(form):
    return form.__name__


def _forms(op):
    """The op, and its forms that run on CPUs."""
    return [op, *(form for form in op.forms if form.device != "cuda")]


NORMS, RESIDUALS, SUMS = map(_forms, (ops.modulated_norm, ops.gated_residual, ops.residual_norm))


@pytest.mark.parametrize("form", NORMS, ids=_name)
def test_modulated_norms_have_the_bits_of_stock(form, large):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        x, _, scale, shift = case
        before = x.clone()
        _assert_same(form(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        _assert_same(x, before)

    with torch.no_grad():
        check()


@pytest.mark.parametrize("form", RESIDUALS, ids=_name)
def test_gated_residuals_have_the_bits_of_stock(form, large):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        x, y, by, _ = case
        before = x.clone(), y.clone()
        _assert_same(form(x, y, by), _stock_residual(x, y, by))
        _assert_same(x, before[0])
        _assert_same(y, before[1])

    with torch.no_grad():
        check()


@pytest.mark.parametrize("form", SUMS, ids=_name)
def test_residual_norms_have_the_bits_of_stock(form, large):
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(cases(), st.booleans(), st.booleans())
    def check(case, gated, modulated):
        x, y, by, scale = case
        y = y if gated else y.to(x.dtype)
        before = x.clone(), y.clone()
        h, normed = form(x, y, by if gated else None, _norm, *((scale, by) if modulated else (None, None)))
        stock = _stock_residual(x, y, by) if gated else x + y
        _assert_same(h, stock)
        _assert_same(normed, _stock_norm(stock, scale, by) if modulated else _norm(stock.float()).type_as(stock))
        _assert_same(x, before[0])
        _assert_same(y, before[1])

    with torch.no_grad():
        check()


@torch.no_grad()
def test_sums_of_two_dtypes_have_the_dtype_of_stock(large):
    x, y = torch.randn(1, 9, 8).bfloat16(), torch.randn(1, 9, 8)
    h, normed = ops.residual_norm(x, y, None, _norm, None, None)
    assert (h.dtype, normed.dtype) == (torch.float32, torch.float32)
    assert torch.equal(h, x + y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_real_chunks_and_threads(dtype, threads):
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 777, 1536).to(dtype)
    scale, shift = torch.randn(2, 1, 1, 1536)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert x.numel() > 2 * ops._CHUNK
        _assert_same(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        _assert_same(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))
        _assert_same(ops.cast_norm(x, _norm), _norm(x.float()).type_as(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", ["dimensions", "fp64", "modulation dtype", "other split_index", "shape of y"])
@torch.no_grad()
def test_other_inputs_use_stock_operations(change, large):
    x, y = torch.randn(2, 2, 12, 8)
    scale, shift = torch.randn(2, 2, 1, 8)
    if change == "dimensions":
        x, y = x[0], y[0]
        scale, shift = scale[0], shift[0]
    elif change == "fp64":
        x = x.double()
    elif change == "modulation dtype":
        scale, shift = scale.half(), shift.half()
    elif change == "other split_index":
        scale, shift = (SegmentedModulation(torch.randn(2, 2, 8), split_index, x.shape[1]) for split_index in (3, 4))
    if change == "shape of y":
        y = y[:1]
    else:
        _assert_same(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
    if change != "other split_index":
        _assert_same(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))
    assert not any(way.is_fast for way in tally.counted())


LAYOUTS = {
    "as convolutions leave it": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],
    "every other channel": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "one token for all": lambda x: x[:, :1].expand_as(x),
    "contiguous": lambda x: x,
}


@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@torch.no_grad()
def test_any_layout_uses_a_fast_form_and_results_have_the_strides_of_stock(of_x, of_y, large):
    for batch, dtype, other in itertools.product((1, 2), DTYPES, DTYPES):
        torch.manual_seed(0)
        x, y = LAYOUTS[of_x](torch.randn(batch, 12, 8).to(dtype)), LAYOUTS[of_y](torch.randn(batch, 12, 8).to(other))
        scale, shift = torch.randn(2, batch, 1, 8)
        _assert_same(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        _assert_same(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))
        _assert_same(ops.gated_residual.forms[-1](x, y, shift), _stock_residual(x, y, shift))
        h, normed = ops.residual_norm(x, y, shift, _norm, scale, shift)
        _assert_same(h, _stock_residual(x, y, shift))
        _assert_same(normed, _stock_norm(h, scale, shift))
        if dtype == other:
            h, _ = ops.residual_norm(x, y, None, _norm, scale, shift)
            _assert_same(h, x + y)
    slow = {way for way in tally.counted() if not way.is_fast}
    assert {(way.op, way.reason) for way in slow} <= {("gated residual", ops.SLOW), ("modulated norm", ops.SLOW)}
    assert bool(slow) == bool({of_x, of_y} & {"as convolutions leave it", "every other channel"})


def test_gradients_flow_as_in_stock(large):
    def grads(function):
        torch.manual_seed(0)
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 9, 8), (2, 9, 8), (2, 1, 8), (2, 1, 8))]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = grads(lambda x, y, a, b: ops.gated_residual(ops.modulated_norm(x, _norm, a, b), y, a))
    stock = grads(lambda x, y, a, b: _stock_residual(_stock_norm(x, a, b), y, a))
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@torch.no_grad()
def test_rows_of_two_kinds_become_the_modulations_of_a_block():
    table, rows = torch.randn(1, 6, 8), torch.randn(3, 2, 6, 8).bfloat16()
    temb = torch.cat((rows[:, :1].expand(-1, 4, -1, -1), rows[:, 1:].expand(-1, 5, -1, -1)), dim=1)
    expected = (table.unsqueeze(0) + temb.float()).chunk(6, dim=2)
    two = SegmentedModulation(rows, 4, 9)
    assert torch.equal(two.float(), temb.float())
    assert two.ndim == temb.ndim
    for ours, stock in zip(two.added_to(table), expected, strict=True):
        assert torch.equal(ours.dense(), stock.squeeze(2))


@pytest.fixture
def kernels(as_on_cuda, monkeypatch):
    """The way of GPUs on the CPU, with torch's arithmetic in the kernels' place; what they were given."""
    given = []

    def rows(tensor, x, split_index):
        return tensor if split_index is None else _dense(SegmentedModulation(tensor, split_index, x.shape[1]), x)

    def modulate(normed, scale, shift, dtype, split_index=None):
        given.append(("modulate", scale.shape, split_index))
        return (normed * (1 + rows(scale, normed, split_index)) + rows(shift, normed, split_index)).to(dtype)

    def gated_residual(x, y, by, split_index=None):
        given.append(("gated_residual", by.shape, split_index))
        return (x.float() + y.float() * rows(by, x, split_index)).to(x.dtype)

    def add_and_cast(x, y):
        given.append(("add_and_cast",))
        return torch.Tensor(x + y), (x + y).float()

    stand_in = SimpleNamespace(modulate=modulate, gated_residual=gated_residual, add_and_cast=add_and_cast)
    monkeypatch.setitem(sys.modules, "wan_patches.ops.triton.modulation", stand_in)
    return given


@pytest.mark.parametrize("kind", ["row", "two rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_kernel_arguments_give_the_bits_of_stock(dtype, kind, kernels):
    given = kernels
    x, y = torch.randn(2, 2, 9, 8).to(dtype)
    tensors = torch.randn(2, 2, 1 if kind == "row" else 2, 8)
    scale, shift = tensors if kind == "row" else (SegmentedModulation(tensor, 4, x.shape[1]) for tensor in tensors)
    for _ in range(2):  # the second time without comparison
        assert torch.equal(ops.modulated_norm(x, _norm, scale, shift), _stock_norm(x, scale, shift))
        assert torch.equal(ops.gated_residual(x, y, shift), _stock_residual(x, y, shift))
        h, normed = ops.residual_norm(x, y, None, _norm, scale, shift)
        assert torch.equal(h, x + y)
        assert torch.equal(normed, _stock_norm(x + y, scale, shift))
    split_index = None if kind == "row" else 4
    modulated, gated = ("modulate", tensors[0].shape, split_index), ("gated_residual", tensors[1].shape, split_index)
    added = [] if dtype == torch.float32 else [("add_and_cast",)]  # there is nothing to cast
    assert given == [modulated, gated, *added, modulated] * 2
    assert [verdict.exact for verdict in gate.verdicts()] == [True] * 3
