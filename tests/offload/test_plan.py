"""Plans: what is chosen and why, what it is estimated to need, what is refused and how it prints. Nothing is moved."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_patches import offload
from wan_patches.offload import BLOCKS, DEVICE, LEAVES, MODEL, OffloadPlan, disable_offload, enable_offload
from wan_patches.pipelines.components import has_hook
from wan_patches.testing.families import FAMILIES

pytest.importorskip("diffusers.hooks.group_offloading")

GIB = 1 << 30


class Pipe:
    """A pipeline as far as plans look at it. A linear layer of `n` has `4 * n` bytes here."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, **components: Any) -> None:
        self.components = components


class Transformer(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 100) -> None:
        super().__init__()
        self.embed = linear(10)
        self.blocks = nn.ModuleList(nn.Sequential(linear(width), linear(width // 2)) for _ in range(blocks))


class VAE(nn.Module):
    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.encoder, self.decoder = linear(width), linear(width)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents)


def linear(n: int) -> nn.Module:
    return nn.Linear(n, 1, bias=False)


def pipeline(**more: Any) -> Pipe:
    text_encoder = nn.Sequential(linear(300), nn.LayerNorm(5), linear(200))
    return Pipe(tokenizer=object(), text_encoder=text_encoder, transformer=Transformer(), vae=VAE(), **more)


def plan(pipe: Any = None, device: Any = "cuda", **options: Any) -> OffloadPlan:
    return enable_offload(pipeline() if pipe is None else pipe, device, dry_run=True, **options)


def peaks(found: OffloadPlan) -> dict[str, int]:
    return {estimate.level: estimate.peak for estimate in found.estimates}


# In bytes: text encoder 4 * (300 + 200 + 2 * 5) = 2040, transformer 40 + 4 * 600 = 2440, VAE 320
TEXT, TRANSFORMER, EMBED, BLOCK, LAYER, NORM, CODEC, CODER = 2040, 2440, 40, 600, 400, 40, 320, 160


def test_estimates_of_every_level_with_a_stream():
    found = plan(budget=10**6)
    assert peaks(found) == {
        "none": TEXT + TRANSFORMER + CODEC,
        "model": TRANSFORMER + CODEC,
        "group": 1200 + 800 + NORM + CODEC,  # the encoder's two layers: more than two blocks
        "leaf": 1200 + 800 + NORM,
    }
    placements = {p.name: p for p in found.estimates[2].placements}
    assert list(placements) == ["text_encoder", "transformer", "vae"]
    assert placements["transformer"].peak == EMBED + 2 * BLOCK
    assert placements["transformer"].pinned == 4 * BLOCK
    assert [(p.how, p.stream) for p in placements.values()] == [(LEAVES, True), (BLOCKS, True), (DEVICE, False)]
    leaves = {p.name: p.peak for p in found.estimates[3].placements}
    assert leaves == {"text_encoder": TEXT, "transformer": 2 * LAYER, "vae": CODER}


def test_estimates_without_a_stream():
    found = plan(budget=10**6, stream=False)
    assert peaks(found)["group"] == 1200 + NORM + CODEC
    assert peaks(found)["leaf"] == 1200 + NORM
    assert {p.name: p.peak for p in found.estimates[2].placements}["transformer"] == EMBED + BLOCK
    assert not any(p.stream or p.pinned for estimate in found.estimates for p in estimate.placements)
    assert found.streams == "not wanted"


def test_blocks_per_group_are_on_the_device_together_and_exclude_a_stream():
    found = plan(budget=10**6, blocks_per_group=3)
    assert {p.name: p.peak for p in found.estimates[2].placements}["transformer"] == EMBED + 3 * BLOCK
    assert "one block at a time" in found.streams
    with pytest.raises(ValueError, match="use blocks_per_group=1 or stream=False"):
        plan(blocks_per_group=3, stream=True)


def test_low_cpu_mem_usage_needs_no_pinned_memory():
    assert plan(level="group").pinned == TEXT + 4 * BLOCK
    assert plan(level="group", low_cpu_mem_usage=True).pinned == 0


def test_tied_weights_and_shared_models_count_once():
    pipe = pipeline()
    pipe.components["text_encoder_2"] = pipe.components["text_encoder"]
    assert peaks(plan(pipe, budget=10**6)) == peaks(plan(budget=10**6))
    embedding, tied = nn.Embedding(100, 1), nn.Embedding(100, 1)
    tied.weight = embedding.weight
    found = plan(Pipe(text_encoder=nn.Sequential(embedding, tied, linear(10))), level="leaf")
    assert found.peak == 400 + 40


def test_buffers_of_streamed_layers_stay_on_the_device():
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(100, 1)
            self.register_buffer("scale", torch.zeros(7))

    pipe = Pipe(text_encoder=nn.Sequential(Scaled()), text_encoder_2=nn.Sequential(linear(200)))
    assert plan(pipe, level="leaf").peak == 800 + 28
    assert plan(pipe, level="leaf", stream=False).peak == 800


def test_compiled_models_are_unwrapped():
    pipe = pipeline()
    expected = plan(pipe, budget=10**6).estimates
    pipe.components["transformer"] = torch.compile(pipe.components["transformer"])
    assert plan(pipe, budget=10**6).estimates == expected


def test_a_model_outside_of_the_sequence_stays_until_the_end():
    found = plan(pipeline(image_encoder=linear(77)), budget=10**6)
    assert peaks(found)["model"] == TRANSFORMER + CODEC + 4 * 77


@pytest.mark.parametrize(
    ("room", "level", "reason"),
    [
        (4800, "none", "everything fits"),
        (4799, "model", "the first level that fits; 'none' would not"),
        (2700, "group", "the first level that fits; 'none', 'model' would not"),
        (2040, "group", "the first level that fits; 'none', 'model' would not"),  # the VAE by layers
        (2039, "group", "the smallest possible level, still 1 bytes too large"),  # as large as leaves
    ],
)
def test_auto_chooses_the_first_level_that_fits(room, level, reason):
    found = plan(budget=room + 100, reserve=100)
    assert found.level == level
    assert found.fits == (found.peak <= room) == (room >= 2040)
    assert found.reason.startswith(reason)


def test_a_quarter_is_reserved_by_default():
    assert plan(budget=1000).reserve == 250
    assert plan(budget=1000, reserve=0).reserve == 0


def test_requesting_a_stream_excludes_levels_without_one():
    assert plan(budget=10**6, stream=True).level == "group"
    with pytest.raises(ValueError, match="does not support streams"):
        plan(level="model", stream=True)


def test_a_named_level_is_chosen_even_if_it_may_not_fit():
    found = plan(level="none", budget=2800, reserve=0)
    assert found.level == "none"
    assert found.fits is False
    assert found.reason == "requested; it may not fit, unlike 'model'"
    assert plan(level="leaf", budget=10, reserve=0).reason.endswith("nor does anything smaller")
    assert plan(level="model", budget=10**6).reason == "requested"


def test_group_is_chosen_if_the_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(offload.plan, "_room", lambda device: None)
    found = plan()
    assert found.level == "group"
    assert found.fits is None
    assert "pass a `budget`" in found.reason
    assert "memory on the device: unknown" in str(found)


@pytest.mark.parametrize(
    ("device", "streams", "used"),
    [
        ("cuda", "diffusers' own path", True),
        ("mps", "torch.mps has no streams", False),
    ],
)
def test_streams_by_device(device, streams, used):
    found = plan(device=device, level="group", budget=10**6)
    assert found.streams == streams
    assert {p.stream for p in found.placements if p.how == BLOCKS} == {used}


def test_a_real_pipeline_prints_as_a_table():
    pipe = FAMILIES["wan22_i2v"].build(dtype=torch.bfloat16)
    found = plan(pipe, level="group", budget=24 * GIB)
    lines = str(found).splitlines()
    assert lines[0] == "WanImageToVideoPipeline on cuda: level 'group' (requested)"
    row = next(line for line in lines if line.split()[:1] == ["transformer_2"])
    assert "WanTransformer3DModel" in row
    assert "block by block" in row
    assert "yes" in row
    assert sum(line.endswith("fits, chosen") for line in map(str.rstrip, lines)) == 1
    assert "memory on the device: 24.0 GiB, of which 6.0 GiB are reserved; activations are not estimated" in str(found)
    assert "streams: diffusers' own path" in str(found)
    assert "pinned host memory: " in str(found)
    assert all(len(line) <= 140 for line in lines)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.level = "none"


def test_estimated_weights_match_the_pipeline():
    pipe = FAMILIES["wan21_i2v"].build(dtype=torch.bfloat16)
    found = plan(pipe, level="model")
    assert [p.name for p in found.placements] == [
        name for name, part in pipe.components.items() if isinstance(part, nn.Module)
    ]
    for placement in found.placements:
        module = pipe.components[placement.name]
        tied = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
        assert placement.weights == sum(tied.values())
        assert placement.how == MODEL


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "block"}, "unknown level 'block'; known: auto, none, model, group, leaf"),
        ({"stream": "yes"}, "`stream` must be True, False or 'auto', not 'yes'"),
        ({"blocks_per_group": 0}, "`blocks_per_group` must be an integer of at least 1, not 0"),
        ({"budget": -1}, "`budget` must be a number of bytes, not -1"),
        ({"reserve": -1}, "`reserve` must be a number of bytes, not -1"),
        ({"device": "cpu"}, "cannot offload from 'cpu'"),
        ({"device": "meta"}, "cannot offload from 'meta'"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


@pytest.mark.parametrize("wrong", [None, nn.Linear(2, 2), "Wan-AI/Wan2.2", SimpleNamespace(components=[])])
def test_objects_that_are_not_pipelines_are_rejected(wrong):
    with pytest.raises(TypeError, match="expects a diffusers pipeline, not "):
        enable_offload(wrong, "cuda")
    with pytest.raises(ValueError, match="not offloaded by enable_offload"):
        disable_offload(wrong)


def test_a_pipeline_without_models():
    with pytest.raises(ValueError, match="has no models"):
        plan(Pipe(scheduler=object(), transformer=None))


def test_a_pipeline_with_a_device_map():
    pipe = pipeline()
    pipe.hf_device_map = {"transformer": 0}
    with pytest.raises(ValueError, match=r"pipe\.reset_device_map\(\) first"):
        plan(pipe)


def test_a_pipeline_on_the_meta_device_is_rejected():
    with torch.device("meta"):
        transformer = Transformer()
    with pytest.raises(ValueError, match="transformer has no weights yet"):
        plan(Pipe(transformer=transformer))


def test_bitsandbytes_weights_are_moved_whole_or_not_at_all():
    pipe = pipeline()
    pipe.components["text_encoder"].is_loaded_in_4bit = True
    assert plan(pipe, budget=2760, reserve=0).level == "model"
    found = plan(pipe, budget=1000)
    assert found.level == "model"
    assert found.fits is False
    assert "bitsandbytes has quantised text_encoder" in str(found)
    for level in ("group", "leaf"):
        with pytest.raises(ValueError, match=f"level '{level}' is not possible: bitsandbytes .*; use 'none', 'model'"):
            plan(pipe, level=level)
    with pytest.raises(ValueError, match="no possible level can use a stream: bitsandbytes"):
        plan(pipe, stream=True)


def test_a_pipeline_without_a_sequence_of_models():
    pipe = pipeline()
    pipe.model_cpu_offload_seq = None
    assert plan(pipe, budget=4799, reserve=0).level == "group"
    with pytest.raises(ValueError, match=r"level 'model' is not possible.*use 'none', 'group', 'leaf'"):
        plan(pipe, level="model")


def test_a_component_that_cannot_be_split_stays_on_the_device():
    pipe = pipeline()
    pipe.components["vae"]._supports_group_offloading = False
    found = plan(pipe, level="leaf")
    assert {p.name: p.how for p in found.placements}["vae"] == DEVICE
    assert found.peak == TEXT + CODEC


def test_without_accelerate(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find_spec(name, *rest)
    )
    assert plan(budget=10**6).level == "none"
    with pytest.raises(ImportError, match="pip install accelerate"):
        plan(level="group")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without an accelerator")
def test_a_machine_without_an_accelerator(monkeypatch):
    if hasattr(torch, "accelerator"):  # others in this process may have registered one
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
    with pytest.raises(ValueError, match="torch found no accelerator"):
        plan(device=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a device that is not there")
def test_an_unavailable_device_leaves_the_pipeline_unchanged():
    pipe = FAMILIES["wan_t2v"].build()
    for level in offload.LEVELS:
        with pytest.raises(ValueError, match="the device cuda is not available: "):
            enable_offload(pipe, "cuda", level=level)
        for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
            assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
            assert not has_hook(module, "group_offloading")
            assert not hasattr(module, "_hf_hook")
        with pytest.raises(ValueError, match="not offloaded"):
            disable_offload(pipe)


def test_the_example_plans(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "offload.py"
    spec = importlib.util.spec_from_file_location("offload_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    FAMILIES["wan_t2v"].build().save_pretrained(tmp_path / "model")
    example.main(str(tmp_path / "model"), "a fox", device="cuda", dry_run=True)
    assert "WanPipeline on cuda: level " in capsys.readouterr().out
