"""Components of diffusers' pipelines, of lookalikes, and of pipelines that other libraries have changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_patches.pipelines import components
from wan_patches.testing.families import FAMILIES, available


class Block(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(1, 1), nn.ModuleList(inner)


class Model(nn.Module):
    def __init__(self, repeated: list[str] | None = None) -> None:
        super().__init__()
        self._repeated_blocks = repeated
        self.blocks = nn.ModuleList([Block(Block()), Block()])
        self.norms = nn.ModuleList([nn.LayerNorm(1)])
        self.empty = nn.ModuleList()


def pipe(**parts: Any) -> SimpleNamespace:
    return SimpleNamespace(components=parts)


@pytest.mark.parametrize(
    "thing", [object(), SimpleNamespace(components=None), SimpleNamespace(components=[nn.Identity()])]
)
def test_other_objects_have_no_components(thing):
    assert components.components(thing) == {}
    assert not components.modules(thing)
    assert not components.is_managed(thing)
    assert components.execution_device(thing) == torch.device("cpu")


def test_a_compiled_and_a_shared_module_count_once():
    shared, compiled = nn.Identity(), torch.compile(nn.Linear(1, 1))
    found = pipe(tokenizer=object(), transformer=compiled, encoder=shared, again=shared)
    assert list(components.modules(found).values()) == [compiled, shared, shared]
    assert components.distinct_modules(found) == {"transformer": compiled._orig_mod, "encoder": shared}


@pytest.mark.parametrize("name", available())
def test_denoisers_are_recognised_by_component_name(name):
    found = FAMILIES[name].build()
    of_diffusers = {
        name
        for name, part in found.components.items()
        if type(part).__module__.startswith("diffusers.models.transformers.")
    }
    assert components.denoisers(found).keys() == of_diffusers != set()
    for model in components.denoisers(found).values():
        assert any(
            {type(block).__name__ for block in blocks.values()} <= {*model._no_split_modules}
            for blocks in components.block_lists(model)
        )


def test_blocks_are_instances_of_the_classes_that_the_model_names():
    assert [[*blocks] for blocks in components.block_lists(Model(["Block"]))] == [["blocks.0", "blocks.1"]]
    assert [[*blocks] for blocks in components.block_lists(Model())] == [["blocks.0", "blocks.1"], ["norms.0"]]
    assert [[*blocks] for blocks in components.block_lists(Model(["Other"]))] == [["blocks.0", "blocks.1"], ["norms.0"]]
    assert components.block_lists(nn.Linear(1, 1)) == []


def test_tied_tensors_count_once():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    second.weight = first.weight
    assert len(components.tensors(first, second, nn.BatchNorm1d(1))) == 3 + 5


def test_execution_device_of_an_offloaded_pipeline_is_where_it_computes():
    found = SimpleNamespace(_execution_device=torch.device("meta"), device=torch.device("cpu"))
    assert components.execution_device(found) == torch.device("meta")
    assert components.execution_device(SimpleNamespace(device="meta")) == torch.device("meta")


@pytest.mark.parametrize("compile_it", [torch.compile, lambda model: model.compile() or model, None])
def test_compiled_models_and_blocks_are_detected(compile_it):
    model = Model()
    assert not components.is_compiled(model)
    if compile_it is None:
        model.blocks[0].compile()
    else:
        model = compile_it(model)
    assert components.is_compiled(model)


def test_quantised_models_are_detected():
    model = Model()
    assert not components.is_quantized(model)
    assert not components.is_quantized_by_bitsandbytes(model)
    model.is_loaded_in_4bit = model.is_quantized = True
    assert components.is_quantized(model)
    assert components.is_quantized_by_bitsandbytes(torch.compile(model))


def test_device_maps_and_offloading_are_detected():
    assert not components.is_managed(pipe(vae=Model()))
    mapped = pipe(vae=Model())
    mapped.hf_device_map = {"vae": "cpu"}
    assert components.has_device_map(mapped)
    assert components.is_managed(mapped)
    hooked = pipe(vae=Model())
    hooked.components["vae"]._hf_hook = object()
    assert components.has_accelerate_hooks(hooked)
    assert components.is_managed(hooked)


def test_group_offloading_is_distinguished_from_other_hooks():
    hooks = pytest.importorskip("diffusers.hooks")
    found = pipe(vae=Model())
    here = torch.device("cpu")
    hooks.apply_layerwise_casting(found.components["vae"], torch.float16, torch.float32)
    assert components.has_hook(found.components["vae"], "layerwise_casting")
    assert not components.is_managed(found)
    found.components["vae"] = Model()
    hooks.apply_group_offloading(found.components["vae"], here, here, offload_type="leaf_level")
    assert components.has_hook(found.components["vae"], "group_offloading")
    assert components.is_managed(found)
