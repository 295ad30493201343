"""Whose code a call of a module comes to, with what libraries and people put before it."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm

from wan_patches.bindings.forwards import forward_of, is_untouched, runs

pytestmark = pytest.mark.upstream


def _look(module, seen):
    forward = module.forward
    module.forward = lambda *args: seen.append(args) or forward(*args)


def _look_as_a_method(module, seen):
    def forward(self, *args):
        seen.append(args)
        return type(self).forward(self, *args)

    module.forward = types.MethodType(forward, module)


def _look_by_a_partial(module, seen):
    def forward(forward, *args):
        seen.append(args)
        return forward(*args)

    module.forward = functools.partial(forward, module.forward)


def _look_by_torch(module, seen):
    module.register_forward_pre_hook(lambda _, args: seen.append(args))


def _look_by_diffusers(module, seen):
    from diffusers.hooks import HookRegistry, ModelHook

    class Looking(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(args)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Looking(), "looking")


def _look_by_diffusers_new_forward(module, seen):
    from diffusers.hooks import HookRegistry, ModelHook

    class Looking(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            seen.append(args)
            return self.fn_ref.original_forward(*args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Looking(), "looking")


def _look_by_accelerate(module, seen, append=False):
    hooks = pytest.importorskip("accelerate.hooks")

    class Looking(hooks.AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(args)
            return super().pre_forward(module, *args, **kwargs)

    hooks.add_hook_to_module(module, Looking("cpu"), append=append)


def _look_by_one_of_two(module, seen):
    move_by_accelerate(module)
    _look_by_accelerate(module, seen, append=True)


def _look_below(module, seen):
    _look(module, seen)
    move_by_groups(module)
    move_by_accelerate(module)


def _look_above(module, seen):
    move_by_groups(module)
    move_by_accelerate(module)
    _look(module, seen)


LOOKS = [
    _look, _look_as_a_method, _look_by_a_partial, _look_by_torch, _look_by_diffusers, _look_by_diffusers_new_forward,
    _look_by_accelerate, _look_by_one_of_two, _look_below, _look_above,
]  # fmt: skip


def move_by_groups(module):
    from diffusers.hooks import apply_group_offloading

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([module])})
    with pytest.MonkeyPatch.context() as patch:  # up to 0.40 diffusers asks for one, streams or not
        if hasattr(torch, "accelerator"):
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        apply_group_offloading(model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def cast(module):
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    hook = LayerwiseCastingHook(torch.float32, torch.float32, False)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "layerwise_casting")


def move_by_accelerate(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))


def move_whole(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.CpuOffload("cpu"))


def move_twice(module):
    hooks = pytest.importorskip("accelerate.hooks")
    move_by_accelerate(module)
    hooks.add_hook_to_module(module, hooks.CpuOffload("cpu"), append=True)


def move_in_all_ways(module):
    cast(module)
    move_by_groups(module)
    move_twice(module)


def leave_the_method_there(module):
    hooks = pytest.importorskip("accelerate.hooks")
    move_by_accelerate(module)
    hooks.remove_hook_from_module(module)
    assert "forward" in vars(module)


MOVES = [
    move_by_groups, cast, move_by_accelerate, move_whole, move_twice, move_in_all_ways, leave_the_method_there,
]  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_who_may_look_stands_before_it(look):
    norm, seen = FP32LayerNorm(4), []
    look(norm, seen)
    assert forward_of(norm) is None
    assert not is_untouched(norm)
    norm(torch.ones(1, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("move", MOVES)
def test_who_moves_and_casts_does_not(move):
    norm = FP32LayerNorm(4)
    move(norm)
    assert forward_of(norm) is FP32LayerNorm.forward
    assert runs(norm, "layer_norm")
    assert is_untouched(norm) == (move is leave_the_method_there)
    assert norm(torch.ones(1, 4)).shape == (1, 4)


def test_a_plain_module_runs_what_its_class_has():
    norm = FP32LayerNorm(4)
    assert forward_of(norm) is FP32LayerNorm.forward
    assert runs(norm, "rms_norm", "layer_norm")
    assert not runs(norm, "rms_norm")
    assert is_untouched(norm)
    assert is_untouched(torch.nn.RMSNorm(4))


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("cls", [FP32LayerNorm, torch.nn.RMSNorm])
def test_others_code_in_a_class_is_not_the_librarys(cls, wraps, monkeypatch):
    stock = cls.forward

    def forward(self, *args):
        return stock(self, *args)

    monkeypatch.setattr(cls, "forward", functools.wraps(stock)(forward) if wraps else forward)
    norm = cls(4)
    assert forward_of(norm) is None
    assert not is_untouched(norm)


def test_others_code_in_the_librarys_function_is_not_the_librarys(monkeypatch):
    def forward(self, inputs):
        return inputs

    monkeypatch.setattr(FP32LayerNorm.forward, "__code__", forward.__code__)
    assert forward_of(FP32LayerNorm(4)) is None


def test_the_librarys_own_decorators_hand_everything_on():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, ffn_dim=12, num_layers=1)
    function = forward_of(model)
    assert function.__code__.co_name == "forward"
    assert runs(model, "condition_embedder")


def test_a_proxy_is_not_what_it_stands_for(monkeypatch):
    wrapt = pytest.importorskip("wrapt")
    wrapper = wrapt.FunctionWrapper(FP32LayerNorm.forward, lambda function, _, args, kwargs: function(*args, **kwargs))
    monkeypatch.setattr(FP32LayerNorm, "forward", wrapper)
    norm = FP32LayerNorm(4)
    assert forward_of(norm) is None
    assert not is_untouched(norm)


def test_a_copy_whose_hook_calls_the_forward_of_the_first_is_none():
    norm = FP32LayerNorm(4)
    cast(norm)  # by diffusers, whose hooks do
    assert forward_of(copy.deepcopy(norm)) is None
    norm = FP32LayerNorm(4)
    move_by_accelerate(norm)
    assert forward_of(copy.deepcopy(norm)) is FP32LayerNorm.forward


def test_a_compiled_norm_is_not_left_out():
    norm = FP32LayerNorm(4)
    norm.compile(backend="eager")
    assert not is_untouched(norm)
