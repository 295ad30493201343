"""The condition video: encoded in chunks by VAEs that support it, built for all others."""

from __future__ import annotations

import pytest
import torch

import wan_patches
from wan_patches.ops.conditioning import ConditionVideo
from wan_patches.patching import tally
from wan_patches.testing.families import FAMILIES, available
from wan_patches.testing.relatives import RELATIVES
from wan_patches.testing.relatives import available as relatives_available

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

I2V = [name for name in ("wan21_i2v", "wan22_i2v", "skyreels_v2_i2v", "chronoedit") if name in available()]


def _pipe(name):
    pipe = FAMILIES[name].build(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _prepared(pipe, frames=9, last=False, batch=1, generator=None):
    size = (3, 32, 48)
    image, final = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"last_image": final} if last else {}
    channels, dtype = pipe.vae.config.z_dim, torch.float32
    generator = generator or torch.Generator().manual_seed(1)
    return pipe.prepare_latents(
        image, batch, channels, *size[1:], frames, dtype, torch.device("cpu"), generator, **options
    )


@pytest.fixture
def encoded(monkeypatch):
    """The condition videos that were made."""
    given, original = [], ConditionVideo.__init__

    def counted(self, *args):
        given.append(self)
        original(self, *args)

    monkeypatch.setattr(ConditionVideo, "__init__", counted)
    return given


@pytest.mark.parametrize("name", I2V)
@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("tiling", [False, True])
def test_latents_are_bit_identical(name, frames, tiling, encoded):
    pipe = _pipe(name)
    if tiling:
        pipe.vae.enable_tiling(24, 24, 16, 16)
    stock = _prepared(pipe, frames)
    with wan_patches.enabled(["conditioning"]):
        patched = _prepared(pipe, frames)
    assert encoded
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(stock, patched))


@pytest.mark.parametrize("name", [name for name in I2V if name != "chronoedit"])
@pytest.mark.parametrize("frames", [5, 9])
def test_first_and_last_frame_and_lists_of_generators(name, frames, encoded):
    pipe = _pipe(name)
    generators = [torch.Generator().manual_seed(nth) for nth in (1, 2)]
    stock = _prepared(pipe, frames, True, 2, generators)
    generators = [torch.Generator().manual_seed(nth) for nth in (1, 2)]
    with wan_patches.enabled(["conditioning", "vae"]):
        patched = _prepared(pipe, frames, True, 2, generators)
    assert encoded
    assert all(map(torch.equal, stock, patched))


def test_the_whole_video_is_never_built():
    """Of 81 frames, no tensor with more pixels than a chunk of four is made while the video is encoded."""
    pipe = _pipe("wan21_i2v")

    def largest():
        # not by a mode, which would see the video, so that it would be built
        with torch.profiler.profile(record_shapes=True) as profile:
            _prepared(pipe, 81)
        shapes = [shape for event in profile.events() for shape in event.input_shapes]
        return max(shape[2] for shape in shapes if len(shape) == 5 and shape[1] == 3)

    assert largest() >= 81
    with wan_patches.enabled(["conditioning"]):
        assert 0 < largest() <= 6  # with the history of a causal convolution


@pytest.mark.parametrize("change", ["subclass", "encode", "tiled_encode"])
def test_custom_autoencoder_gets_the_tensor(change, encoded):
    pipe = _pipe("wan21_i2v")
    stock, seen = _prepared(pipe), []
    vae = pipe.vae
    if change == "subclass":
        own = type(vae)

        class Mine(own):
            def encode(self, x, *args, **kwargs):
                seen.append(x)
                return super().encode(x, *args, **kwargs)

        vae.__class__ = Mine
    else:
        vae.enable_tiling(24, 24, 16, 16)
        stock = _prepared(pipe)
        method = getattr(vae, change)
        setattr(vae, change, lambda x, *args, **kwargs: (seen.append(x), method(x, *args, **kwargs))[1])
    with wan_patches.enabled(["conditioning"]):
        patched = _prepared(pipe)
    assert not encoded
    assert seen
    assert all(type(x) is torch.Tensor for x in seen)
    assert all(map(torch.equal, stock, patched))


def test_image_of_another_size_fails_as_in_stock():
    pipe = _pipe("wan21_i2v")
    image, latents = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 2, 4, 6)
    arguments = (image, 1, 4, 32, 48, 5, torch.float32, torch.device("cpu"), None, latents)
    with pytest.raises(RuntimeError) as stock:
        pipe.prepare_latents(*arguments)
    with wan_patches.enabled(["conditioning"]), pytest.raises(RuntimeError) as patched:
        pipe.prepare_latents(*arguments)
    assert str(stock.value) == str(patched.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in ("hunyuan_video_1.5", "hunyuan_image") if n in relatives_available()])
@pytest.mark.parametrize("image", [False, True])
@torch.no_grad()
def test_tokens_of_several_prompts_are_bit_identical(name, image, dtype):
    """Of two samples, each with its own invalid tokens in both prompts."""
    pipe = RELATIVES[name].build(dtype=dtype)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    RELATIVES[name].run(pipe, dtype=dtype)
    hook.remove()
    given = {
        key: torch.cat([value] * 2) if isinstance(value, torch.Tensor) and len(value) == 1 else value
        for key, value in calls[0].items()
    }
    for key, mask in given.items():
        if "attention_mask" in key and mask is not None:
            given[key] = (torch.arange(mask[0].numel()) % torch.tensor([[2], [3]]) == 0).to(mask)
    if image:
        if "image_embeds" not in given:
            pytest.skip("the model takes no image")
        given["image_embeds"] = torch.randn_like(given["image_embeds"])
    stock = pipe.transformer(**given)[0]
    with wan_patches.enabled(["conditioning"]):
        tally.reset()
        patched = pipe.transformer(**given)[0]
        ways = {way.form: calls for way, calls in tally.counted().items() if way.op == "order of prompt tokens"}
    assert stock.isfinite().all()
    assert torch.equal(stock, patched)
    assert ways == {"": 1}  # stock's operations, the fastest on CPUs


@pytest.mark.skipif("hunyuan_image" not in relatives_available(), reason="an older diffusers")
def test_gradients_of_prompts_are_stocks():
    pipe = RELATIVES["hunyuan_image"].build(dtype=torch.float32)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    RELATIVES["hunyuan_image"].run(pipe, dtype=torch.float32)
    hook.remove()

    def gradient():
        prompt = calls[0]["encoder_hidden_states"].clone().requires_grad_()
        pipe.transformer(**{**calls[0], "encoder_hidden_states": prompt})[0].square().sum().backward()
        return prompt.grad

    stock = gradient()
    with wan_patches.enabled(["conditioning"]):
        patched = gradient()
    assert stock.any()
    assert torch.equal(stock, patched)
