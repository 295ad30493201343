"""Blocks of every model family, stock against patched, and the tensors that Helios passes to its blocks."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections import Counter

import pytest
import torch

import wan_patches
from wan_patches.bindings import modulation as patch
from wan_patches.ops import dispatch, fused_norm
from wan_patches.ops import modulation as ops
from wan_patches.ops.modulation import SegmentedModulation
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity

pytestmark = pytest.mark.upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIM, HEADS, SEQ, TEXT = 96, 3, 50, 7

BLOCKS = {
    "transformer_wan": "WanTransformerBlock",
    "transformer_wan_vace": "WanVACETransformerBlock",
    "transformer_wan_animate": "WanTransformerBlock",
    "transformer_chronoedit": "WanTransformerBlock",
    "transformer_skyreels_v2": "SkyReelsV2TransformerBlock",
    "transformer_helios": "HeliosTransformerBlock",
    "transformer_anyflow": "AnyFlowTransformerBlock",
    "transformer_anyflow_far": "AnyFlowTransformerBlock",
}
ANYFLOW = {"transformer_anyflow": {}, "transformer_anyflow_far": {"is_causal": True}}


def _class(module, name):
    try:
        return getattr(importlib.import_module(f"diffusers.models.transformers.{module}"), name)
    except ImportError:
        pytest.skip("this diffusers has none")


def _weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _block(module, dtype, **more):
    kind = _class(module, BLOCKS[module])
    more |= ANYFLOW.get(module, {"qk_norm": "rms_norm_across_heads"})
    block = kind(DIM, 2 * DIM, HEADS, cross_attn_norm=True, **more)
    return _weights(block).to(dtype)


def _inputs(module, dtype, batch=2, per_token=False):
    x, text = torch.randn(batch, SEQ, DIM).to(dtype), torch.randn(batch, TEXT, DIM).to(dtype)
    temb = torch.randn(batch, 6, DIM).to(dtype)
    if per_token:  # SkyReels-V2 alone has the tokens third
        dim = 2 if module == "transformer_skyreels_v2" else 1
        temb = torch.stack([torch.randn(batch, 6, DIM).to(dtype) for _ in range(SEQ)], dim=dim)
    angles = torch.rand(1, SEQ, 1, DIM // HEADS // 2).repeat_interleave(2, -1) * 10
    if module in ANYFLOW:  # which always has an axis of tokens, complex tables and a mask
        table = torch.polar(torch.ones(1, 1, SEQ, DIM // HEADS // 2), angles[:, None, :, 0, ::2])
        rows = temb if per_token else temb[:, None].expand(batch, SEQ, 6, DIM)
        return x, text, rows, {"query": table, "key": table}, None
    if module == "transformer_helios":
        return x, text, temb, torch.cat((angles.cos(), angles.sin()), -1).squeeze(2), SEQ - 13
    if module == "transformer_wan_vace":
        return x, text, torch.randn(batch, SEQ, DIM).to(dtype), temb, (angles.cos(), angles.sin())
    if module == "transformer_skyreels_v2":  # which had complex tables once, and takes a mask
        return x, text, temb, None, None
    return x, text, temb, (angles.cos(), angles.sin())


def _outputs(result):
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor is not None]


def _count(calls, name, form, *args):
    calls[name] = calls.get(name, 0) + 1
    return form(*args)


@pytest.fixture
def fast_forms(any_size, monkeypatch):
    """Small inputs take the way of large ones, in several chunks; how often they did."""
    calls = {}
    for name in ("modulated_norm_in_chunks", "gated_residual_in_chunks", "residual_norm_in_chunks"):
        form = getattr(ops, name)
        monkeypatch.setattr(form, "function", functools.partial(_count, calls, name, form.function))
    monkeypatch.setattr(ops, "_CHUNK", 11 * DIM)
    return calls


@pytest.mark.parametrize("per_token", [False, True], ids=["one row", "a row per token"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", BLOCKS)
@torch.no_grad()
def test_blocks_are_bit_identical_to_stock(module, dtype, per_token, fast_forms):
    block, inputs = _block(module, dtype), _inputs(module, dtype, per_token=per_token)
    try:
        expected = _outputs(block(*inputs))
    except RuntimeError as error:
        if not per_token:
            raise
        pytest.skip(f"stock itself takes no row per token: {error}")
    with wan_patches.enabled(["modulation"], strict=module != "transformer_wan_animate"):
        assert fast_forms == {}
        actual = _outputs(block(*inputs))
    if module == "transformer_helios":
        assert fast_forms == {"modulated_norm_in_chunks": 2, "gated_residual_in_chunks": 2}
    else:
        names = ("modulated_norm_in_chunks", "residual_norm_in_chunks", "gated_residual_in_chunks")
        assert fast_forms == dict(zip(names, (1, 2, 1)))
    for ours, stock in zip(actual, expected, strict=True):
        assert ours.dtype == stock.dtype
        assert ours.stride() == stock.stride()
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_causal_anyflow_without_a_cache_is_bit_identical_to_stock(dtype, fast_forms):
    """Its pipeline always has a cache; those who train it evaluate it so."""
    kind = _class("transformer_anyflow_far", "AnyFlowFARTransformer3DModel")
    model = _weights(
        kind(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=64, num_layers=2, full_chunk_limit=2,
        )
    ).to(dtype)  # fmt: skip
    model.scale_shift_table.data = model.scale_shift_table.data.float()  # as `from_pretrained` keeps it
    latents, text = torch.randn(1, 3, 4, 8, 8).to(dtype), torch.randn(1, 5, 16).to(dtype)
    timesteps = torch.tensor([[900.0, 600.0, 300.0]])
    expected = model(latents, timesteps, timesteps / 2, text, [1, 1, 1]).sample
    with wan_patches.enabled(["modulation"], strict=True):
        assert torch.equal(model(latents, timesteps, timesteps / 2, text, [1, 1, 1]).sample, expected)
    assert fast_forms["modulated_norm_in_chunks"] == 3  # one in each block, and the last


@pytest.mark.parametrize("mixed", ["fp32 table", "autocast", "fp64"])
def test_mixed_dtypes_are_bit_identical_to_stock(mixed, fast_forms):
    module = "transformer_wan"
    block = _block(module, torch.float64 if mixed == "fp64" else torch.bfloat16)
    inputs = _inputs(module, torch.float64 if mixed == "fp64" else torch.bfloat16)
    if mixed == "fp32 table":  # as `from_pretrained` keeps it
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed == "autocast"):
        expected = block(*inputs)
        with wan_patches.enabled(["modulation"]):
            assert torch.equal(block(*inputs), expected)
    assert bool(fast_forms) == (mixed == "fp32 table")


def test_training_uses_stock_operations(fast_forms):
    module = "transformer_wan"
    block, inputs = _block(module, torch.float32), _inputs(module, torch.float32)

    def gradients():
        block.zero_grad()
        block(*inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]

    expected = gradients()
    with wan_patches.enabled(["modulation"]):
        actual = gradients()
    assert len(actual) > 10
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert fast_forms == {}


@torch.no_grad()
def test_observed_norm_is_called_as_in_stock(fast_forms):
    module = "transformer_wan"
    block, inputs = _block(module, torch.bfloat16), _inputs(module, torch.bfloat16)
    seen = []
    for norm in (block.norm1, block.norm2):
        norm.register_forward_hook(lambda _, args, result: seen.append((args[0].shape, result.clone(), result)))
    expected = block(*inputs)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(block(*inputs), expected)
    assert [shape for shape, *_ in seen] == [(2, SEQ, DIM)] * 4
    assert all(torch.equal(before, now) for _, before, now in seen)  # no returned tensor was modified
    assert fast_forms == {"residual_norm_in_chunks": 1, "gated_residual_in_chunks": 1}  # the third norm


@torch.no_grad()
def test_norms_with_a_replaced_class_forward_are_called_as_in_stock(fast_forms, monkeypatch):
    module = "transformer_wan"
    block, inputs, seen = _block(module, torch.bfloat16), _inputs(module, torch.bfloat16), []
    norm = type(block.norm1)
    stock = norm.forward

    def forward(self, x):
        seen.append(x.shape)
        return stock(self, x) - x.mean()  # of all that it is called with

    monkeypatch.setattr(norm, "forward", forward)
    expected, shapes = block(*inputs), seen.copy()
    seen.clear()
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(block(*inputs), expected)
    assert seen == shapes == [(2, SEQ, DIM)] * 3
    assert fast_forms == {"gated_residual_in_chunks": 1}


@torch.no_grad()
def test_norms_after_hook_removal_are_called_a_few_tokens_at_a_time(fast_forms):
    module = "transformer_wan"
    block, inputs = _block(module, torch.bfloat16), _inputs(module, torch.bfloat16)
    expected = block(*inputs)
    for norm in (block.norm1, block.norm2, block.norm3):
        norm.forward = norm.forward  # what removed hooks leave
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(block(*inputs), expected)
    assert sum(fast_forms.values()) == 4


@pytest.mark.parametrize("module", ["transformer_wan", "transformer_helios", "transformer_anyflow"])
@torch.no_grad()
def test_compiled_blocks_are_one_graph_with_the_result_of_stock(module, fast_forms):
    block, inputs = _block(module, torch.float32), _inputs(module, torch.float32, batch=1)
    torch.compiler.reset()
    expected = torch.compile(block, fullgraph=True)(*inputs)
    torch.compiler.reset()
    with wan_patches.enabled(["modulation", "qk"]):
        actual = torch.compile(block, fullgraph=True)(*inputs)
    assert torch.equal(actual, expected)
    assert fast_forms == {}


@torch.no_grad()
def test_close_blocks_call_close_norms_which_are_exact_without_kernels(fast_forms):
    def called():
        close = {fused_norm.modulated_norm.name: "modulated_norm", fused_norm.residual_norm.name: "residual_norm"}
        return Counter({close[way.op]: calls for way, calls in tally.counted().items() if way.op in close})

    block, inputs = _block("transformer_wan", torch.bfloat16), _inputs("transformer_wan", torch.bfloat16)
    expected = block(*inputs)
    with wan_patches.enabled(["modulation"], fidelity="close"):
        assert torch.equal(block(*inputs), expected)
        assert called() == {"modulated_norm": 1, "residual_norm": 2}
        states = {report.fidelity: report for report in wan_patches.status().of("modulation") if _is_wan(report)}
        assert states[Fidelity.CLOSE].state == "active"
        assert (states[Fidelity.EXACT].state, states[Fidelity.EXACT].reason) == ("off", "a close form is in its place")
        with wan_patches.enabled(["modulation"]):  # and back
            assert torch.equal(block(*inputs), expected)
        assert called().total() == 3
        block(*inputs)
        assert called().total() == 6
    assert torch.equal(block(*inputs), expected)
    assert called().total() == 6


def _is_wan(report):
    return report.module == "diffusers.models.transformers.transformer_wan"


@torch.no_grad()
def test_row_per_token_is_never_materialised_in_fp32(fast_forms, monkeypatch):
    monkeypatch.setattr(ops.RowPerToken, "dense", lambda self: pytest.fail("it is whole"))
    block = _block("transformer_wan", torch.bfloat16)
    inputs = _inputs("transformer_wan", torch.bfloat16, per_token=True)
    expected = block(*inputs)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(block(*inputs), expected)


# Helios: two kinds of tokens


def _helios(**more):
    kind = _class("transformer_helios", "HeliosTransformer3DModel")
    model = kind(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_dim=(8, 8, 8), **more,
    )  # fmt: skip
    return _weights(model)


def _request(batch=1, history=True, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = {"short": (3, 3, 8, 8), "mid": (2, 2, 8, 8), "long": (4, 4, 8, 8)}
    request = {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8).to(dtype),
        "timestep": torch.full((batch,), 321.0),
        "encoder_hidden_states": torch.randn(batch, 5, 16).to(dtype),
        "indices_hidden_states": torch.arange(9, 12).expand(batch, -1),
        "return_dict": False,
    }
    first = {"long": 0, "mid": 4, "short": 6}
    for name, (frames, *size) in shapes.items() if history else ():
        request[f"latents_history_{name}"] = torch.randn(batch, 4, *size[:1], *size[1:]).to(dtype)
        request[f"indices_latents_history_{name}"] = torch.arange(first[name], first[name] + frames).expand(batch, -1)
    return request


@pytest.fixture
def block_inputs(any_size, monkeypatch):
    """The modulations that blocks receive."""
    found, real = [], patch.modulations

    def modulations(table, temb):
        found.append(temb)
        return real(table, temb)

    pytest.importorskip("diffusers.models.transformers.transformer_helios")
    monkeypatch.setattr(patch, "modulations", modulations)
    _forget_calls()
    yield found
    wan_patches.disable()
    _forget_calls()


def _forget_calls():
    """What patches have put into modules stays there; tests put something else."""
    for module in [module for name, module in sys.modules.items() if name.startswith("diffusers.models.transformers.")]:
        for name in ("_wan_patches_modulations", "_wan_patches_close_modulations"):
            vars(module).pop(name, None)


@pytest.mark.parametrize("config", [{}, {"guidance_cross_attn": False}, {"is_amplify_history": True}])
@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_helios_is_bit_identical_with_two_rows(dtype, batch, history, config, fast_forms, block_inputs):
    model, request = _helios(**config).to(dtype), _request(batch, history, dtype)
    expected = model(**request)[0]
    with wan_patches.enabled(["modulation"], strict=True):
        actual = model(**request)[0]
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
    assert len(block_inputs) == (2 if history else 0)  # one row for all tokens is as in Wan
    for value in block_inputs:
        assert isinstance(value, SegmentedModulation)
        assert value.rows.shape == (batch, 2, 6, 48)
        assert 0 < value.split_index < value.seq
    assert fast_forms


@torch.no_grad()
def test_helios_without_a_separate_history_timestep_has_one_row(fast_forms, monkeypatch):
    model, request = _helios(zero_history_timestep=False), _request()
    expected = model(**request)[0]
    seen, real = [], ops.modulated_norm_in_chunks.function

    def form(x, norm, scale, shift):
        seen.append(scale.shape)
        return real(x, norm, scale, shift)

    monkeypatch.setattr(ops.modulated_norm_in_chunks, "function", form)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(model(**request)[0], expected)
    assert seen[:2] == [(1, 1, 48)] * 2


def _observe_by_torch_hook(module, observe, finish):
    module.register_forward_pre_hook(lambda _, args: observe(*args))


def _observe_by_global_torch_hook(module, observe, finish):
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda other, args: observe(*args) if other is module else None
    )
    finish.callback(hook.remove)


def _observe_by_attribute(module, observe, finish):
    forward = module.forward
    module.forward = lambda *args: observe(*args) or forward(*args)


def _observe_in_class(module, observe, finish):
    stock = type(module).forward

    @functools.wraps(stock)
    def forward(self, *args):
        if self is module:
            observe(*args)
        return stock(self, *args)

    type(module).forward = forward
    finish.callback(setattr, type(module), "forward", stock)


def _observe_in_subclass(module, observe, finish):
    class Own(type(module)):
        def forward(self, *args):
            observe(*args)
            return super().forward(*args)

    Own.__name__ = type(module).__name__
    module.__class__ = Own


def _observe_by_diffusers_hook(module, observe, finish):
    from diffusers.hooks import HookRegistry, ModelHook

    class ObservingHook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            observe(*args)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ObservingHook(), "observing")


def _observe_by_accelerate_hook(module, observe, finish):
    hooks = pytest.importorskip("accelerate.hooks")

    class ObservingHook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            observe(*args)
            return args, kwargs

    hooks.add_hook_to_module(module, ObservingHook())


OBSERVERS = [
    _observe_by_torch_hook, _observe_by_global_torch_hook, _observe_by_attribute, _observe_in_class,
    _observe_in_subclass, _observe_by_diffusers_hook, _observe_by_accelerate_hook,
]  # fmt: skip


@pytest.mark.parametrize("at", ["block", "output norm"])
@pytest.mark.parametrize("attach", OBSERVERS)
@torch.no_grad()
def test_helios_passes_stock_tensors_if_observed(attach, at, block_inputs):
    model, request, seen = _helios(), _request(), []

    def observe(*args):
        temb = args[2] if at == "block" else args[1]
        seen.append((temb.shape, temb[:, -3:].clone()))

    with contextlib.ExitStack() as finish:
        attach(model.blocks[1] if at == "block" else model.norm_out, observe, finish)
        expected = model(**request)[0]
        with wan_patches.enabled(["modulation"]):
            actual = model(**request)[0]
    assert torch.equal(actual, expected)
    (shape, rows), (same_shape, same_rows) = seen
    assert shape == same_shape
    assert torch.equal(rows, same_rows)
    assert not any(isinstance(value, SegmentedModulation) for value in block_inputs)


@torch.no_grad()
def test_helios_passes_stock_tensors_for_few_elements(block_inputs, monkeypatch):
    """No form would take two rows: stock's tensor is made once, and not in each operation."""
    model, request = _helios(), _request()
    expected = model(**request)[0]
    tally.reset()
    monkeypatch.setattr(dispatch, "_any_size", False)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(model(**request)[0], expected)
    assert block_inputs
    assert not any(isinstance(value, SegmentedModulation) for value in block_inputs)
    assert {way.reason for way in tally.counted() if way.op == "rows of two kinds"} == {dispatch.SMALL}


def test_helios_passes_stock_tensors_for_gradients(block_inputs):
    model, request = _helios(), _request()
    expected = model(**request)[0]
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(model(**request)[0], expected)
    assert block_inputs
    assert not any(isinstance(value, SegmentedModulation) for value in block_inputs)


@pytest.mark.parametrize("config", [{}, {"zero_history_timestep": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_helios_has_the_gradients_of_stock(dtype, config, fast_forms):
    model, request = _helios(**config).to(dtype), _request(2, True, dtype)

    def gradients():
        model.zero_grad()
        model(**request)[0].float().square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    with wan_patches.enabled(["modulation"]):
        actual = gradients()
    assert [name for name, gradient in actual.items() if not torch.equal(gradient, expected[name])] == []
    assert fast_forms == {}


def _offload_by_groups(model):
    with pytest.MonkeyPatch.context() as patch:  # up to 0.40 diffusers asks for one, streams or not
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def _offload_by_leaves(model):
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def _align_devices(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (model, *model.blocks, model.norm_out):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))


@pytest.mark.parametrize("move", [_offload_by_groups, _offload_by_leaves, _align_devices])
@torch.no_grad()
def test_offloading_hooks_keep_two_rows(move, block_inputs):
    model, request = _helios(), _request()
    expected = model(**request)[0]
    move(model)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(model(**request)[0], expected)
    assert len(block_inputs) == 2
    assert all(isinstance(value, SegmentedModulation) for value in block_inputs)


@torch.no_grad()
def test_dense_modulation_of_two_tokens_is_not_two_rows(fast_forms):
    """A sequence of two tokens has a dense modulation of the same shape as two rows."""
    block, inputs = _block("transformer_helios", torch.bfloat16), list(_inputs("transformer_helios", torch.bfloat16, 1))
    inputs[0], inputs[3], inputs[4] = inputs[0][:, :2], inputs[3][:, :2], 1
    inputs[2] = torch.randn(1, 2, 6, DIM).bfloat16()
    expected = block(*inputs)
    with wan_patches.enabled(["modulation"]):
        assert torch.equal(block(*inputs), expected)


@torch.no_grad()
def test_compiled_helios_blocks_take_two_rows(block_inputs):
    model, request = _helios(), _request()
    expected = model(**request)[0]
    torch.compiler.reset()
    with wan_patches.enabled(["modulation"]):
        compiled = copy.deepcopy(model)
        for block in compiled.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        actual = compiled(**request)[0]
    assert torch.equal(actual, expected)
    assert all(isinstance(value, SegmentedModulation) for value in block_inputs)
    assert block_inputs
