"""The extra name for `set_attention_backend`: available while enabled, never chosen by default, removed completely."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys

import diffusers
import pytest
import torch

import wan_patches
from wan_patches.bindings import attention_backends
from wan_patches.ops import npu
from wan_patches.ops.npu import attention
from wan_patches.patches.attention_backends import NAME, PATCHES
from wan_patches.patching.registry import Registry
from wan_patches.patching.status import ACTIVE, SKIPPED

pytestmark = pytest.mark.upstream

module = importlib.import_module("diffusers.models.attention_dispatch")
names, table = module.AttentionBackendName, module._AttentionBackendRegistry


def snapshot():
    tables = {name: dict(value) for name, value in vars(table).items() if isinstance(value, dict)}
    sets = {name: set(value) for name, value in vars(table).items() if isinstance(value, set)}
    return (
        list(names),
        dict(names.__members__),
        dict(names._value2member_map_),
        set(dir(names)),
        table.list_backends(),
        tables,
        sets,
        table._active_backend,
    )


@pytest.fixture
def registry(monkeypatch):
    """Only this patch; diffusers as it was afterwards."""
    monkeypatch.setattr(table, "_active_backend", table._active_backend)  # a model's choice becomes that of all
    before, dicts = snapshot(), [value for value in vars(table).values() if isinstance(value, dict)]
    made = Registry(PATCHES)
    yield made
    made.disable()
    names._value2member_map_.pop(NAME, None)  # stay where a model used the name
    for kept in dicts:
        kept.pop(attention_backends.backend._member, None)
    attention_backends.backend._module = None
    table._active_backend = before[-1]
    assert snapshot() == before


@pytest.fixture
def usable(torch_npu_stand_in, monkeypatch):
    """As if torch_npu had been there when diffusers was imported."""
    monkeypatch.setattr(module, "_CAN_USE_NPU_ATTN", True)
    monkeypatch.setattr(module, "npu_fusion_attention", torch_npu_stand_in.npu_fusion_attention)
    return torch_npu_stand_in


def transformer():
    shape = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 64, "text_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.WanTransformer3DModel(**shape).bfloat16().eval()


def forward(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator).bfloat16()
    prompt = torch.randn(1, 8, 32, generator=generator).bfloat16()
    with torch.no_grad():
        return model(latents, torch.tensor([500]), prompt, return_dict=False)[0]


def test_name_is_registered_while_enabled_and_leaves_no_trace(registry):
    before = snapshot()
    assert NAME not in names.__members__.values()
    for _ in range(3):
        assert registry.enable(strict=True).reports[0].state == ACTIVE
        registry.enable()
        assert [member.value for member in names].count(NAME) == 1
        assert isinstance(names(NAME), names)
        assert names(NAME) == NAME
        assert names[NAME.upper()] is names(NAME)
        assert names(NAME) in table.list_backends()
        registry.disable()
        assert snapshot() == before
        with pytest.raises(ValueError, match="is not a valid"):
            names(NAME)


def test_nothing_is_chosen_by_enabling(registry):
    model = transformer()
    before = table._active_backend, [block.attn1.processor._attention_backend for block in model.blocks]
    stock = forward(model)
    registry.enable()
    assert (table._active_backend, [block.attn1.processor._attention_backend for block in model.blocks]) == before
    assert torch.equal(forward(model), stock)


def test_selecting_it_without_torch_npu_raises(registry, monkeypatch):
    monkeypatch.setattr(module, "_CAN_USE_NPU_ATTN", False)
    registry.enable()
    before = snapshot()
    with pytest.raises(RuntimeError, match="torch_npu"):
        transformer().set_attention_backend(NAME)
    assert snapshot() == before


def test_selecting_it_without_mindie_raises(registry, usable, monkeypatch):
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    npu.forget()
    registry.enable()
    with pytest.raises(RuntimeError, match=f"'{NAME}' needs MindIE-SD: ModuleNotFoundError"):
        transformer().set_attention_backend(NAME)


def test_other_backends_are_selected_and_rejected_as_in_stock(registry):
    model = transformer()
    registry.enable()
    model.set_attention_backend("native")
    model.set_attention_backend("_native_math")
    if not module._CAN_USE_FLASH_ATTN:
        with pytest.raises(RuntimeError, match="flash-attn"):
            model.set_attention_backend("flash")
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("nope")


def test_short_sequences_use_native_npu(registry, usable):
    model = transformer()
    stock = forward(model)
    model.set_attention_backend("_native_npu")
    fused = forward(model)
    assert not torch.equal(fused, stock)  # or nothing would have been called
    registry.enable()
    model.set_attention_backend(NAME)
    assert all(block.attn1.processor._attention_backend is names(NAME) for block in model.blocks)
    assert torch.equal(forward(model), fused)


def test_models_keep_it_after_disable_but_it_cannot_be_selected(registry, usable):
    model = transformer()
    registry.enable()
    model.set_attention_backend(NAME)
    expected = forward(model)
    registry.disable()
    assert NAME not in list(names)
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(copy.deepcopy(model)), expected)
    with pytest.raises(ValueError, match="must be one of"):
        transformer().set_attention_backend(NAME)
    registry.enable()
    assert model.blocks[0].attn1.processor._attention_backend is names(NAME)
    assert torch.equal(forward(model), expected)
    other = transformer()
    other.set_attention_backend(NAME)
    model.reset_attention_backend()
    assert all(block.attn1.processor._attention_backend is None for block in model.blocks)


def test_the_context_manager_takes_the_name(registry, usable):
    model = transformer()
    with module.attention_backend("_native_npu"):
        fused = forward(model)
    registry.enable()
    before = table._active_backend
    with module.attention_backend(NAME):
        assert torch.equal(forward(model), fused)
    assert table._active_backend == before


@pytest.mark.skipif(not hasattr(table, "_is_context_parallel_available"), reason="came with diffusers 0.36")
def test_context_parallel_is_refused(registry, usable):
    registry.enable()
    assert not table._is_context_parallel_available(names(NAME))
    with pytest.raises(ValueError, match=f"'{NAME}' does not support context parallelism"):
        table._backends[names(NAME)](*tensors(), _parallel_config=object())


def test_it_can_be_pickled(registry, usable):
    registry.enable()
    model = transformer()
    model.set_attention_backend(NAME)
    assert pickle.loads(pickle.dumps(names(NAME))) is names(NAME)
    assert torch.equal(forward(pickle.loads(pickle.dumps(model))), forward(model))


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch 2.5 compiles no model with a chosen backend")
def test_a_compiled_model_can_use_it(registry, usable):
    model = transformer()
    model.set_attention_backend("_native_npu")
    fused = forward(model)
    registry.enable()
    model.set_attention_backend(NAME)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(forward(compiled), fused)
    torch.compiler.reset()


# Long sequences, as if CPU tensors were on an NPU


@pytest.fixture
def laser(registry, usable, monkeypatch):
    """The backend, a counter of its laser calls, and inputs that are long enough for it."""
    calls, laser_attention = [], usable.attention_forward

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return laser_attention(*args, **kwargs)

    monkeypatch.setattr(usable, "attention_forward", counted)
    monkeypatch.setattr(usable, "LASER_TOKENS", 16)
    monkeypatch.setattr(attention, "_MIN_TOKENS", 16)
    monkeypatch.setattr(attention, "_DEVICE", "cpu")
    npu.forget()
    registry.enable()
    return table._backends[names(NAME)], calls


def tensors(tokens=16, keys=None, dtype=torch.bfloat16, dim=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 2, dim, generator=generator).to(dtype) for n in (tokens, keys or tokens, keys or tokens)]


def test_long_self_attention_is_laser_attention(laser):
    backend, calls = laser
    given = tensors()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in given))
    out = backend(*given)
    assert calls == [
        {"scale": None, "head_first": False}
        | {"opt_mode": "manual", "op_type": "ascend_laser_attention", "layout": "BNSD"}
    ]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact.transpose(1, 2), rtol=2e-2, atol=2e-2)
    assert torch.equal(backend(*given, scale=32**-0.5), out)
    assert not torch.equal(backend(*given, scale=1), out)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "given",
    [tensors(tokens=8), tensors(keys=32), tensors(dtype=torch.float32), tensors(dim=256)],
    ids=["short", "cross-attention", "fp32", "head_dim"],
)
def test_other_attention_is_fused_attention(given, laser):
    backend, calls = laser
    assert torch.equal(backend(*given), table._backends[names._NATIVE_NPU](*given))
    assert not calls


def test_masks_use_a_backend_that_supports_them_or_raise(laser):
    backend, calls = laser
    given, mask = tensors(), torch.ones(1, 16, dtype=torch.bool)
    mask[:, 8:] = False
    fused = table._backends[names._NATIVE_NPU]
    if "attn_mask" in table._supported_arg_names[names._NATIVE_NPU]:
        assert torch.equal(backend(*given, attn_mask=mask), fused(*given, attn_mask=mask))
        assert not torch.equal(backend(*given, attn_mask=mask), fused(*given))
    else:
        with pytest.raises(ValueError, match="takes no `attn_mask`"):
            backend(*given, attn_mask=mask)
    with pytest.raises(ValueError, match="takes no `is_causal`"):
        backend(*given, is_causal=True)
    assert table._supported_arg_names[names(NAME)] >= {"attn_mask", "is_causal", "scale", "dropout_p"}
    assert not calls


def test_autograd_uses_a_backend_with_a_backward(laser):
    backend, calls = laser
    given = [tensor.requires_grad_() for tensor in tensors()]
    backend(*given).sum().backward()
    assert given[0].grad is not None
    assert not calls


# What is not known


def test_unknown_backend_tables_are_left_alone(registry, monkeypatch):
    before = snapshot()
    with monkeypatch.context() as changed:
        changed.delattr(table, "_constraints")
        (report,) = registry.enable().reports
        assert (report.state, report.reason) == (SKIPPED, "its attention backends are not kept as they are known")
        registry.disable()
    assert snapshot() == before


def test_diffusers_backend_of_the_same_name_is_left_alone(registry, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setitem(names._member_map_, NAME.upper(), names.NATIVE)
        assert "has an attention backend 'mindiesd_laser' of its own" in registry.enable().reports[0].reason
        registry.disable()
        assert names._member_map_[NAME.upper()] is names.NATIVE


# Advice


class FakeNPU:
    def __init__(self, there):
        self.is_available = lambda: there


@pytest.mark.parametrize("mindie", [True, False])
def test_status_recommends_fused_attention_with_an_npu(mindie, registry, monkeypatch):
    monkeypatch.setattr(torch, "npu", FakeNPU(True), raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: mindie or None)
    status = registry.enable()
    (line,) = status.advice
    assert "set_attention_backend with '_native_npu'" in line
    assert (NAME in line) == mindie
    assert " ".join(line.split()) in " ".join(str(status).split())


def test_status_does_not_mention_it_without_an_npu(registry, monkeypatch):
    monkeypatch.setattr(torch, "npu", FakeNPU(False), raising=False)
    assert registry.enable().advice == ()
    monkeypatch.delattr(torch, "npu")
    assert registry.status().advice == ()
    assert "attention backend" not in str(wan_patches.status()).replace("attention_backend", "")
