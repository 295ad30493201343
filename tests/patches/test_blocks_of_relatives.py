"""Blocks of Wan-Animate 2 and Kandinsky, stock against patched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import wan_patches
from wan_patches.ops import modulation as ops
from wan_patches.ops import rms_norm
from wan_patches.patching import tally

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("any_size")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIM, HEAD, TIME, SEQ, TEXT = 192, 96, 32, 64, 7
GRID = 4, 4, 4  # of the tokens
MODULATED, RESIDUAL, CAST, NORM = "modulated norm", "gated residual", "cast norm", "RMS norm"
PATCHES = ["modulation", "qk", "rope"]


class Case(NamedTuple):
    """A block: its module in `diffusers.models.transformers`, its class, and what makes its arguments.

    size: arguments of its constructor.
    calls: the expected calls of forms, by op.
    """

    module: str
    cls: str
    size: tuple[int, ...]
    arguments: Callable[[torch.dtype, int], tuple[Any, ...]]
    calls: dict[str, int]
    options: dict[str, Any] = {}  # noqa: RUF012

    def build(self, dtype: torch.dtype) -> nn.Module:
        block = getattr(_module(self.module), self.cls)(*self.size, **self.options)
        torch.manual_seed(0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
        block.to(dtype)
        for name, part in block.named_modules():  # as `from_pretrained` keeps them
            if "modulation" in name or name.startswith("norm"):
                part.float()
        if isinstance(getattr(block, "modulation", None), nn.Parameter):
            block.modulation.data = block.modulation.data.float()
        return block.eval()


def _module(name: str) -> Any:
    return pytest.importorskip(f"diffusers.models.transformers.{name}", reason="this diffusers has none")


def _tokens(dtype: torch.dtype, batch: int, seq: int = SEQ) -> torch.Tensor:
    return torch.randn(batch, seq, DIM).to(dtype)


def _matrices(*shape: int) -> torch.Tensor:
    angles = torch.rand(*shape, 1, HEAD // 2) * 10
    rows = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1)
    return rows.unflatten(-1, (2, 2))


def _of_animate_2(dtype: torch.dtype, batch: int) -> tuple[Any, ...]:
    library = _module("transformer_wan_animate_2")
    grids = torch.tensor([GRID] * batch)
    pictures, cache = _tokens(dtype, batch, 5), library.WanAnimate2KVLayerCache()
    table = torch.cat([library.rope_params(16, HEAD // 3)] * 3, dim=1)
    temb = torch.randn(batch, 6, DIM)
    return _tokens(dtype, batch), temb, _tokens(dtype, batch, TEXT), cache, "extract", table, grids, pictures


def _of_fused(dtype: torch.dtype, batch: int, audio: int = 24) -> tuple[Any, ...]:
    texts = _tokens(dtype, batch, TEXT), _tokens(dtype, batch, TEXT)
    times = torch.randn(batch, TIME), torch.randn(batch, TIME)
    sound = _tokens(dtype, batch, audio) if audio else None
    return _tokens(dtype, batch), sound, *texts, times, _matrices(SEQ), _matrices(audio) if audio else None


def _sparse() -> dict[str, Any]:
    return {"sta_mask": torch.ones(SEQ // 64, SEQ // 64).bool(), "threshold": 0.8}


_FUSED_SIZE = (DIM, TIME, 2 * DIM, HEAD) * 2
_OF_BOTH = {MODULATED: 8, RESIDUAL: 8, NORM: 12}

CASES = {
    "wan_animate_2": Case(
        "transformer_wan_animate_2",
        "WanAnimate2TransformerBlock",
        (DIM, 2 * DIM, 2),
        _of_animate_2,
        {MODULATED: 2, RESIDUAL: 2, CAST: 1, NORM: 5},
        {"cross_attn_norm": True},
    ),
    "kandinsky5, text": Case(
        "transformer_kandinsky",
        "Kandinsky5TransformerEncoderBlock",
        (DIM, TIME, 2 * DIM, HEAD),
        lambda d, b: (_tokens(d, b), torch.randn(b, TIME), _matrices(1, SEQ)),
        {MODULATED: 2, RESIDUAL: 2, NORM: 2},
    ),
    "kandinsky5": Case(
        "transformer_kandinsky",
        "Kandinsky5TransformerDecoderBlock",
        (DIM, TIME, 2 * DIM, HEAD),
        lambda d, b: (_tokens(d, b), _tokens(d, b, TEXT), torch.randn(b, TIME), _matrices(b, SEQ), None),
        {MODULATED: 3, RESIDUAL: 3, NORM: 4},
    ),
    "kandinsky6, text": Case(
        "transformer_kandinsky6",
        "Kandinsky6TransformerEncoderBlock",
        (DIM, TIME, 2 * DIM, HEAD),
        lambda d, b: (_tokens(d, b), torch.randn(b, TIME), _matrices(SEQ)),
        {MODULATED: 2, RESIDUAL: 2, NORM: 2},
    ),
    "kandinsky6": Case(
        "transformer_kandinsky6",
        "Kandinsky6FusedTransformerDecoderBlock",
        _FUSED_SIZE,
        lambda d, b: _of_fused(d, b, audio=0),
        {MODULATED: 3, RESIDUAL: 3, NORM: 4},
    ),
    "kandinsky6, sound": Case(
        "transformer_kandinsky6", "Kandinsky6FusedTransformerDecoderBlock", _FUSED_SIZE, _of_fused, _OF_BOTH
    ),
    "kandinsky6, as published": Case(
        "transformer_kandinsky6",
        "Kandinsky6FusedTransformerDecoderBlock",
        _FUSED_SIZE,
        _of_fused,
        _OF_BOTH,
        dict.fromkeys(("ca_rope", "cross_gates", "fix_modulation"), True),
    ),
    "kandinsky6_sr": Case(
        "transformer_kandinsky6_sr",
        "Kandinsky6SRTransformerBlock",
        (DIM, TIME, 2 * DIM, HEAD),
        lambda d, b: (_tokens(d, b), torch.randn(b, TIME), _matrices(SEQ), _sparse()),
        {MODULATED: 2, RESIDUAL: 2, NORM: 2},
    ),
}


def _tensors(result: Any) -> list[torch.Tensor]:
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor is not None]


def _assert_equal(ours: Any, stock: Any) -> None:
    for a, b in zip(_tensors(ours), _tensors(stock), strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)
        assert b.isfinite().all()


def _forms() -> Counter[str]:
    """Returns the calls by forms, of each op; the rotary embedding has tests of its own."""
    found: Counter[str] = Counter()
    for way, calls in tally.counted().items():
        if way.is_fast and way.op in (MODULATED, RESIDUAL, CAST, NORM):
            found[way.op] += calls
    return found


def _has_norm(dtype: torch.dtype, dim: int, cast: bool) -> bool:
    """Whether this version of torch computes the norm in the order that the form knows."""
    return rms_norm._is_exact(dtype, dim, torch.get_num_threads(), True, cast)


@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_blocks_are_bit_identical_to_stock(name, dtype, batch, monkeypatch):
    case = CASES[name]
    block, arguments = case.build(dtype), case.arguments(dtype, batch)
    stock = block(*arguments)
    expected = Counter(case.calls)
    if dtype == torch.float32:
        expected.pop(CAST, None)  # nothing is cast
    if not _has_norm(dtype, HEAD, cast="sr" in name or "5" in name):
        expected.pop(NORM)
    monkeypatch.setattr(ops, "_CHUNK", 11 * DIM)  # several chunks
    monkeypatch.setattr(rms_norm, "_CHUNK", 11 * HEAD)
    tally.reset()
    with wan_patches.enabled(PATCHES):
        assert not _forms()
        _assert_equal(block(*arguments), stock)
    assert _forms() == expected


@pytest.mark.loop("kandinsky5", "kandinsky6", "wan_animate_2")
@pytest.mark.parametrize("name", [name for name in CASES if name != "kandinsky6_sr"])  # no gradients on CPUs
def test_training_uses_stock_operations(name):
    case = CASES[name]
    block, arguments = case.build(torch.float32), case.arguments(torch.float32, 1)

    def gradients():
        block.zero_grad()
        sum(tensor.square().sum() for tensor in _tensors(block(*arguments))).backward()
        return [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]

    stock = gradients()
    with wan_patches.enabled(PATCHES):
        assert all(map(torch.equal, gradients(), stock))
    assert len(stock) > 10
    assert not _forms()


@pytest.mark.loop("kandinsky5", "kandinsky6, sound")
@pytest.mark.parametrize("name", [name for name in CASES if name != "wan_animate_2"])  # which reads its grid sizes
@torch.no_grad()
def test_compiled_blocks_are_one_graph_with_the_bits_of_stock(name):
    case = CASES[name]
    block, arguments = case.build(torch.float32), case.arguments(torch.float32, 1)
    results = []
    for patches in ([], PATCHES):
        torch.compiler.reset()
        with wan_patches.enabled(patches):
            results.append(torch.compile(block, backend="eager", fullgraph=True)(*arguments))
    _assert_equal(*results)
    assert not _forms()


@torch.no_grad()
def test_compiled_animate_2_has_as_many_graphs_as_stock():
    case, results, graphs = CASES["wan_animate_2"], [], Counter()
    block, arguments = case.build(torch.float32), case.arguments(torch.float32, 1)

    def backend(graph, _):
        graphs[len(results)] += 1
        return graph.forward

    for patches in ([], PATCHES):
        torch.compiler.reset()
        with wan_patches.enabled(patches):
            results.append(torch.compile(block, backend=backend)(*arguments))
    _assert_equal(*results)
    assert graphs[0] == graphs[1] > 1


@torch.no_grad()
def test_replaced_functions_of_kandinsky_6_are_called(monkeypatch):
    case, seen = CASES["kandinsky6_sr"], []
    block, arguments = case.build(torch.bfloat16), case.arguments(torch.bfloat16, 1)
    library = _module(case.module)
    for name in ("apply_scale_shift", "apply_gate_sum"):
        stock = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *args, stock=stock: seen.append(stock) or stock(*args) + 1)
    expected = block(*arguments)
    before = seen.copy()
    seen.clear()
    with wan_patches.enabled(
        ["modulation"]
    ):  # installed in the blocks before the functions were replaced, or not at all
        _assert_equal(block(*arguments), expected)
    assert len(before) == 4
    assert seen == before


@torch.no_grad()
def test_functions_that_are_replaced_later_are_called(monkeypatch):
    case, seen = CASES["kandinsky6_sr"], []
    block, arguments = case.build(torch.bfloat16), case.arguments(torch.bfloat16, 1)
    library = _module(case.module)
    stock = library.apply_gate_sum
    with wan_patches.enabled(["modulation"]):
        monkeypatch.setattr(library, "apply_gate_sum", lambda *args: seen.append(1) or stock(*args))
        block(*arguments)
    assert seen == [1, 1]


@pytest.mark.parametrize("weights", [True, False])
@torch.no_grad()
def test_norms_with_weights_are_called_as_in_stock(weights):
    """The norms that a user may have put in place of those without weights."""
    case = CASES["kandinsky5"]
    block, arguments = case.build(torch.bfloat16), case.arguments(torch.bfloat16, 1)
    block.feed_forward_norm = nn.LayerNorm(DIM, elementwise_affine=weights)
    stock = block(*arguments)
    with wan_patches.enabled(["modulation"]):
        _assert_equal(block(*arguments), stock)
    assert _forms()[MODULATED] == (2 if weights else 3)


@torch.no_grad()
def test_modulation_in_a_half_dtype():
    """A model that was cast as a whole has no layer in fp32."""
    case = CASES["kandinsky6"]
    block, arguments = case.build(torch.bfloat16).bfloat16(), list(case.arguments(torch.bfloat16, 2))
    stock = block(*arguments)
    with wan_patches.enabled(["modulation"]):
        _assert_equal(block(*arguments), stock)
    assert _forms()[MODULATED] == _forms()[RESIDUAL] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["reference", "generation"])
@torch.no_grad()
def test_animate_2_attends_to_its_cache(cached, dtype):
    """The mask is as dense as can be; a sparse one must be compiled."""
    case = CASES["wan_animate_2"]
    x, temb, text, cache, mode, table, grids, pictures = case.arguments(dtype, 1)
    block = case.build(dtype)
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    frames, hw = GRID[0], GRID[1] * GRID[2]
    lengths = 128 * -(-(frames + 1) * hw // 128), 128 * -(-frames * hw // 128)
    mask = flex.create_block_mask(lambda b, h, q, k: q >= 0, None, None, lengths[0], sum(lengths), device="cpu")
    of_cache = {"reference_rotary_emb": table.conj(), "reference_grid_sizes": grids, "attention_mask": mask}
    of_cache |= {"origin_latent_frames": frames, "origin_latent_hw": hw} if cached else {}

    def run():
        reference = block(x, temb, text, cache, mode, table, grids, pictures)
        if not cached:
            return reference
        return block(x.flip(1), temb, text, cache, "cached", table, grids, pictures, **of_cache)

    stock = run()
    tally.reset()
    with wan_patches.enabled(PATCHES):
        _assert_equal(run(), stock)
    rotated = {way.form: calls for way, calls in tally.counted().items() if way.op.startswith("rotary")}
    assert rotated == {"a few tokens at a time": 5 if cached else 2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change", ["none", "eps", "fp32 weight", "no weight", "strided", "a hook", "one head", "a token for each"]
)
@torch.no_grad()
def test_norms_of_heads(change, dtype):
    from wan_patches.bindings.qk import head_norm

    norm = nn.RMSNorm(HEAD, eps=1e-5 if change == "eps" else None, elementwise_affine=change != "no weight")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.to(torch.float32 if change == "fp32 weight" else dtype)
    x = (torch.randn(2, 40, 3, HEAD) * 0.1).to(dtype)
    x = x.transpose(1, 2) if change == "strided" else x[:, :, :1].contiguous() if change == "one head" else x
    if change == "a hook":
        norm.register_forward_hook(lambda module, args, result: None)
    if change == "a token for each":
        norm = nn.RMSNorm((3, HEAD)).to(dtype)
    usual = change not in ("strided", "a hook", "a token for each", "fp32 weight")
    for cast in (True, False):
        if not cast and change == "fp32 weight" and dtype != torch.float32:
            continue  # another dtype
        tally.reset()
        _assert_equal(head_norm(norm, x, cast), norm(x.float()).type_as(x) if cast else norm(x))
        known = rms_norm._is_exact(dtype, HEAD, torch.get_num_threads(), change != "eps", cast)
        expected = usual or (change == "fp32 weight" and dtype == torch.float32)
        assert _forms()[NORM] == (1 if expected and known else 0)
