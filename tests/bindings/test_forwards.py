"""Which function a call of a module runs, with the hooks and wrappers of libraries and users in front of it."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm

from wan_patches.bindings.forwards import forward_of, is_untouched, runs

pytestmark = pytest.mark.upstream


def _observe_by_attribute(module, seen):
    forward = module.forward
    module.forward = lambda *args: seen.append(args) or forward(*args)


def _observe_by_method(module, seen):
    def forward(self, *args):
        seen.append(args)
        return type(self).forward(self, *args)

    module.forward = types.MethodType(forward, module)


def _observe_by_partial(module, seen):
    def forward(forward, *args):
        seen.append(args)
        return forward(*args)

    module.forward = functools.partial(forward, module.forward)


def _observe_by_torch_hook(module, seen):
    module.register_forward_pre_hook(lambda _, args: seen.append(args))


def _observe_by_diffusers_hook(module, seen):
    from diffusers.hooks import HookRegistry, ModelHook

    class ObservingHook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(args)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ObservingHook(), "observing")


def _observe_by_diffusers_new_forward(module, seen):
    from diffusers.hooks import HookRegistry, ModelHook

    class ObservingHook(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            seen.append(args)
            return self.fn_ref.original_forward(*args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ObservingHook(), "observing")


def _observe_by_accelerate_hook(module, seen, append=False):
    hooks = pytest.importorskip("accelerate.hooks")

    class ObservingHook(hooks.AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(args)
            return super().pre_forward(module, *args, **kwargs)

    hooks.add_hook_to_module(module, ObservingHook("cpu"), append=append)


def _observe_by_second_accelerate_hook(module, seen):
    align_devices_by_accelerate(module)
    _observe_by_accelerate_hook(module, seen, append=True)


def _observe_below_offloading(module, seen):
    _observe_by_attribute(module, seen)
    offload_by_groups(module)
    align_devices_by_accelerate(module)


def _observe_above_offloading(module, seen):
    offload_by_groups(module)
    align_devices_by_accelerate(module)
    _observe_by_attribute(module, seen)


OBSERVERS = [
    _observe_by_attribute, _observe_by_method, _observe_by_partial, _observe_by_torch_hook,
    _observe_by_diffusers_hook, _observe_by_diffusers_new_forward, _observe_by_accelerate_hook,
    _observe_by_second_accelerate_hook, _observe_below_offloading, _observe_above_offloading,
]  # fmt: skip


def offload_by_groups(module):
    from diffusers.hooks import apply_group_offloading

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([module])})
    with pytest.MonkeyPatch.context() as patch:  # up to 0.40, diffusers requires one, with or without streams
        if hasattr(torch, "accelerator"):
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        apply_group_offloading(model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def cast_layerwise(module):
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    hook = LayerwiseCastingHook(torch.float32, torch.float32, False)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "layerwise_casting")


def align_devices_by_accelerate(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))


def offload_whole_model(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.CpuOffload("cpu"))


def offload_by_two_hooks(module):
    hooks = pytest.importorskip("accelerate.hooks")
    align_devices_by_accelerate(module)
    hooks.add_hook_to_module(module, hooks.CpuOffload("cpu"), append=True)


def offload_and_cast_by_all_hooks(module):
    cast_layerwise(module)
    offload_by_groups(module)
    offload_by_two_hooks(module)


def leave_restored_forward(module):
    hooks = pytest.importorskip("accelerate.hooks")
    align_devices_by_accelerate(module)
    hooks.remove_hook_from_module(module)
    assert "forward" in vars(module)


MOVING_HOOKS = [
    offload_by_groups, cast_layerwise, align_devices_by_accelerate, offload_whole_model, offload_by_two_hooks,
    offload_and_cast_by_all_hooks, leave_restored_forward,
]  # fmt: skip


@pytest.mark.parametrize("observe", OBSERVERS)
def test_hooks_that_may_read_tensors_hide_the_forward(observe):
    norm, seen = FP32LayerNorm(4), []
    observe(norm, seen)
    assert forward_of(norm) is None
    assert not is_untouched(norm)
    norm(torch.ones(1, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("move_by_hook", MOVING_HOOKS)
def test_hooks_that_move_or_cast_tensors_do_not_hide_the_forward(move_by_hook):
    norm = FP32LayerNorm(4)
    move_by_hook(norm)
    assert forward_of(norm) is FP32LayerNorm.forward
    assert runs(norm, "layer_norm")
    assert is_untouched(norm) == (move_by_hook is leave_restored_forward)
    assert norm(torch.ones(1, 4)).shape == (1, 4)


def test_plain_module_runs_forward_of_its_class():
    norm = FP32LayerNorm(4)
    assert forward_of(norm) is FP32LayerNorm.forward
    assert runs(norm, "rms_norm", "layer_norm")
    assert not runs(norm, "rms_norm")
    assert is_untouched(norm)
    assert is_untouched(torch.nn.RMSNorm(4))


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("cls", [FP32LayerNorm, torch.nn.RMSNorm])
def test_replaced_forward_of_class_is_not_library_code(cls, wraps, monkeypatch):
    stock = cls.forward

    def forward(self, *args):
        return stock(self, *args)

    monkeypatch.setattr(cls, "forward", functools.wraps(stock)(forward) if wraps else forward)
    norm = cls(4)
    assert forward_of(norm) is None
    assert not is_untouched(norm)


def test_replaced_code_of_library_function_is_not_library_code(monkeypatch):
    def forward(self, inputs):
        return inputs

    monkeypatch.setattr(FP32LayerNorm.forward, "__code__", forward.__code__)
    assert forward_of(FP32LayerNorm(4)) is None


def test_library_decorators_do_not_hide_the_forward():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, ffn_dim=12, num_layers=1)
    function = forward_of(model)
    assert function.__code__.co_name == "forward"
    assert runs(model, "condition_embedder")


def test_proxy_is_not_the_function_it_wraps(monkeypatch):
    wrapt = pytest.importorskip("wrapt")
    wrapper = wrapt.FunctionWrapper(FP32LayerNorm.forward, lambda function, _, args, kwargs: function(*args, **kwargs))
    monkeypatch.setattr(FP32LayerNorm, "forward", wrapper)
    norm = FP32LayerNorm(4)
    assert forward_of(norm) is None
    assert not is_untouched(norm)


def test_copied_module_whose_hook_calls_the_original_has_no_known_forward():
    norm = FP32LayerNorm(4)
    cast_layerwise(norm)  # a diffusers hook, which keeps calling the original's forward
    assert forward_of(copy.deepcopy(norm)) is None
    norm = FP32LayerNorm(4)
    align_devices_by_accelerate(norm)
    assert forward_of(copy.deepcopy(norm)) is FP32LayerNorm.forward


def test_compiled_norm_is_not_untouched():
    norm = FP32LayerNorm(4)
    norm.compile(backend="eager")
    assert not is_untouched(norm)
