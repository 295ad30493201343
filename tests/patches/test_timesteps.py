"""Wan 2.2 TI2V: two timesteps instead of one per token."""

from __future__ import annotations

import functools

import pytest
import torch

import wan_patches
from wan_patches.bindings import timesteps as patch
from wan_patches.ops.modulation import SegmentedModulation, SegmentedTimesteps
from wan_patches.patches.timesteps import EMBED
from wan_patches.patching.fidelity import Fidelity
from wan_patches.testing.families import FAMILIES, available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def model_inputs(monkeypatch):
    """The timesteps that models are given."""
    found = []

    def embed(embedder, timestep, *more):
        found.append(timestep)
        return original(embedder, timestep, *more)

    original = patch.embed_timesteps
    monkeypatch.setattr(patch, "embed_timesteps", embed)
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    vars(module).pop(EMBED, None)
    yield found
    wan_patches.disable()
    vars(module).pop(EMBED, None)


def _pipeline(kind, dtype=torch.float32, **options):
    if "wan22_ti2v" not in available():
        pytest.skip("this diffusers has none")
    pipe = FAMILIES["wan22_ti2v"].build(dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    if kind == "text":
        from diffusers import WanPipeline

        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
        pipe = WanPipeline(**parts, expand_timesteps=True)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe, seed=0, **more):
    inputs = FAMILIES["wan22_ti2v"].inputs(seed=seed, output_type="latent", **more)
    if type(pipe).__name__ == "WanPipeline":
        del inputs["image"]
    return pipe(**inputs).frames


@pytest.mark.parametrize("kind", ["image", "text"])
def test_models_get_distinct_timesteps_from_the_pipeline(kind, model_inputs):
    pipe = _pipeline(kind)
    stock = _latents(pipe)
    with wan_patches.enabled(["modulation", "timesteps"], fidelity="close", strict=True):
        ours = _latents(pipe)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert len(model_inputs) == 4  # two steps, with and without the prompt
    for timestep in model_inputs:
        if kind == "image":
            assert isinstance(timestep, SegmentedTimesteps)
            assert timestep.values[0] == 0 < timestep.values[1]
            frames, height, width = stock.shape[2:]
            assert timestep.split_index == height * width // 4
            assert frames > 1
        else:
            assert timestep.shape == (1,)
            assert timestep[0] > 0


@pytest.mark.parametrize("kind", ["image", "text"])
@torch.no_grad()
def test_two_rows_have_the_bits_of_a_row_per_token(kind, model_inputs, any_size, monkeypatch):
    """Where the embedding of a timestep does not depend on how many there are, so does nothing else."""
    pipe = _pipeline(kind)
    embed = type(pipe.transformer.condition_embedder.time_embedder).forward

    def one_by_one(self, sample, *more):
        rows = sample.reshape(-1, sample.shape[-1])
        return torch.cat([embed(self, row[None], *more) for row in rows]).reshape(*sample.shape[:-1], -1)

    monkeypatch.setattr(type(pipe.transformer.condition_embedder.time_embedder), "forward", one_by_one)
    project = pipe.transformer.condition_embedder.time_proj
    linear = project.forward

    def each(rows):
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.cat([linear(row[None]) for row in flat]).reshape(*rows.shape[:-1], -1)

    monkeypatch.setattr(project, "forward", each)
    monkeypatch.setattr(patch, "runs_only_library_code", lambda module: True)  # despite the observer
    stock = _latents(pipe, steps=1)
    with wan_patches.enabled(["modulation", "timesteps"], fidelity="close"):
        assert torch.equal(_latents(pipe, steps=1), stock)
    assert model_inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_errors_over_a_whole_loop_are_those_of_stock(dtype, model_inputs):
    """Over many models: of one, either embedding may be luckier by several percent, as the CPU's kernels have it."""
    errors = {"stock": 0.0, "ours": 0.0}
    for seed in range(32):
        pipe, truth = (_pipeline("image", dtype, seed=seed) for _ in range(2))
        truth.transformer.to(torch.float64)
        exact = _latents(truth, seed, steps=4).double()
        errors["stock"] += (_latents(pipe, seed, steps=4).double() - exact).abs().mean().item()
        with wan_patches.enabled(["modulation", "timesteps"], fidelity="close"):
            errors["ours"] += (_latents(pipe, seed, steps=4).double() - exact).abs().mean().item()
    assert any(isinstance(timestep, SegmentedTimesteps) for timestep in model_inputs)
    assert errors["stock"] > 0
    assert errors["ours"] <= 1.01 * errors["stock"], errors


@pytest.mark.parametrize("why", ["exact", "alone", "hooks", "block hooks", "own latents", "subclass"])
def test_stock_is_left_alone(why, model_inputs):
    pipe = _pipeline("image")
    if why == "hooks":
        pipe.transformer.register_forward_pre_hook(lambda *args: None)
    elif why == "block hooks":
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda *args: None)
    elif why == "own latents":
        pipe.prepare_latents = functools.partial(pipe.prepare_latents)
    elif why == "subclass":
        pipe.__class__ = type("Own", (type(pipe),), {})
    stock = _latents(pipe)
    names = ["timesteps"] if why == "alone" else ["modulation", "timesteps"]
    with wan_patches.enabled(names, fidelity="exact" if why == "exact" else "close") as status:
        assert torch.equal(_latents(pipe), stock)
        assert all(report.fidelity is Fidelity.CLOSE for report in status.of("timesteps"))
    assert not any(isinstance(timestep, SegmentedTimesteps) for timestep in model_inputs)
    assert len(model_inputs) == (0 if why == "exact" else 4)


def _observe_by_attribute(module, observe):
    forward = module.forward
    module.forward = lambda *args, **kwargs: observe(*args, **kwargs) or forward(*args, **kwargs)


def _observe_in_class(module, observe):
    stock = type(module).forward

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        observe(*args, **kwargs)
        return stock(self, *args, **kwargs)

    type(module).forward = forward
    return lambda: setattr(type(module), "forward", stock)


def _observe_by_diffusers_hook(module, observe):
    from diffusers.hooks import HookRegistry, ModelHook

    class ObservingHook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            observe(*args, **kwargs)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(module).register_hook(ObservingHook(), "observing")


def _observe_by_accelerate_hook(module, observe):
    hooks = pytest.importorskip("accelerate.hooks")

    class ObservingHook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            observe(*args, **kwargs)
            return args, kwargs

    hooks.add_hook_to_module(module, ObservingHook())


@pytest.mark.parametrize("at", ["model", "embedder", "time embedder", "block"])
@pytest.mark.parametrize(
    "attach", [_observe_by_attribute, _observe_in_class, _observe_by_diffusers_hook, _observe_by_accelerate_hook]
)
def test_stock_is_left_alone_if_observed(attach, at, model_inputs, request):
    pipe, seen = _pipeline("image"), []
    model = pipe.transformer

    def observe(*args, timestep=None, timestep_seq_len=None, **kwargs):
        value = timestep if at == "model" else args[-2] if at == "block" else args[0]
        seen.append((value.shape, value[..., -1] / 1000, timestep_seq_len))

    embedder = model.condition_embedder
    places = {"model": model, "embedder": embedder, "time embedder": embedder.time_embedder, "block": model.blocks[0]}
    finish = attach(places[at], observe)
    if finish is not None:
        request.addfinalizer(finish)
    stock, before = _latents(pipe), seen.copy()
    seen.clear()
    with wan_patches.enabled(["modulation", "timesteps"], fidelity="close"):
        assert torch.equal(_latents(pipe), stock)
    assert [(shape, seq) for shape, _, seq in seen] == [(shape, seq) for shape, _, seq in before]
    assert all(torch.equal(value, other) for (_, value, _), (_, other, _) in zip(seen, before, strict=True))
    assert len(model_inputs) == 4
    assert not any(isinstance(timestep, SegmentedTimesteps) for timestep in model_inputs)


@pytest.mark.parametrize("offload", ["model", "sequential", "groups"])
def test_offloading_hooks_keep_segmented_timesteps(offload, model_inputs, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    pipe = _pipeline("image")
    stock = _latents(pipe)
    if offload == "model":
        accelerate.hooks.add_hook_to_module(
            pipe.transformer, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    elif offload == "sequential":
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    else:
        with monkeypatch.context() as patch:  # up to 0.40 diffusers asks for one, streams or not
            if hasattr(torch, "accelerator"):
                patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            pipe.transformer.enable_group_offload(
                torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            )
    with wan_patches.enabled(["modulation", "timesteps"], fidelity="close"):
        ours = _latents(pipe)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert all(isinstance(timestep, SegmentedTimesteps) for timestep in model_inputs)


def test_segmented_modulation_and_timesteps_behave_like_tensors():
    rows = SegmentedModulation(torch.randn(1, 2, 12), 3, 7)
    assert rows.ndim == rows.dense().ndim == 3
    assert torch.equal(rows.unflatten(2, (6, -1)).dense(), rows.dense().unflatten(2, (6, -1)))
    assert rows.to("meta", non_blocking=True).rows.is_meta
    timesteps = SegmentedTimesteps(torch.tensor([0, 9]), 3, (2, 5))
    assert timesteps.to("meta").values.is_meta
    assert timesteps.flatten().tolist() == [0, 0, 0, 9, 9] * 2
