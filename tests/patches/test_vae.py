"""Wan's autoencoder and Qwen-Image's, stock against patched, and the cases that fall back to stock code."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import pickle
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

import wan_patches
from wan_patches.bench.measure import using_threads
from wan_patches.bindings import vae as patch
from wan_patches.ops import vae_division as division
from wan_patches.ops.vae import FrameCaches
from wan_patches.patching import tally

pytestmark = [pytest.mark.upstream]

diffusers = pytest.importorskip("diffusers")

SMALL = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
REAL = {}  # 96 channels, 16 of them latent
RESIDUAL = {
    **{"base_dim": 16, "decoder_base_dim": 24, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
    **{"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}
REAL_QWEN = {"of": "AutoencoderKLQwenImage", "dim_mult": [1, 2, 4, 4]}  # a tuple by default in 0.36, which fails
QWEN = {**SMALL, **REAL_QWEN}
KINDS = {"wan 2.1": SMALL, "wan 2.2": RESIDUAL, "qwen image": QWEN}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Some CPUs take minutes for real channels in bf16.
REAL_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


def _build(config, dtype=torch.float32):
    torch.manual_seed(0)
    config = dict(config)
    cls = getattr(diffusers, config.pop("of", "AutoencoderKLWan"))
    return cls(**config).to(dtype).eval()


def _latents(vae, frames, height, width, batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator).to(vae.dtype)


def _video(vae, frames, height, width, batch=1):
    scale = 8 * (vae.config.get("patch_size") or 1)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, frames, height * scale, width * scale, generator=generator).to(vae.dtype)


@torch.no_grad()
def _both(vae, latents, video):
    return vae.decode(latents).sample, vae.encode(video).latent_dist.parameters


def _same(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def _compare(vae, latents, video):
    try:
        stock = _both(vae, latents, video)
    except RuntimeError as error:
        pytest.skip(f"stock itself fails: {error}")
    with wan_patches.enabled(["vae"], strict=True):
        patched = _both(vae, latents, video)
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in stock)
    assert _same(stock[0], patched[0])
    assert _same(stock[1], patched[1])


def _tile(vae):
    scale = vae.config.get("patch_size") or 1
    sizes = {"min": 32 * scale, "stride": 24 * scale}
    sides = "height", "width"
    vae.enable_tiling(**{f"tile_sample_{what}_{side}": sizes[what] for what in sizes for side in sides})


@pytest.fixture
def taken(monkeypatch):
    """How many passes took the short way."""
    passes = []
    original = FrameCaches.__init__

    def counted(self, *args):
        passes.append(self)
        original(self, *args)

    monkeypatch.setattr(FrameCaches, "__init__", counted)
    return passes


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decode_and_encode_are_bit_identical(kind, dtype, frames):
    vae = _build(KINDS[kind], dtype)
    _compare(vae, _latents(vae, frames, 5, 4), _video(vae, 4 * frames - 3, 5, 4))


@pytest.fixture
def as_on_gpus(as_on_cuda, monkeypatch):
    """The layers take the way of GPUs, on the CPU, with torch's arithmetic in the place of kernels."""

    def norm_silu(x, length, scale, gamma, bias, out, last):
        value = (x / length.clamp_min(1e-12)).to(x.dtype) * scale * gamma
        out.copy_(torch.nn.functional.silu(value + (0.0 if bias is None else bias)))
        if last is not None:
            last.copy_(out[:, :, -last.shape[2] :])

    def add_bias_and_residual(y, bias, shortcut):
        y += bias.view(-1, 1, 1, 1)
        y += shortcut

    def add_bias_and_measure(y, bias, dtype):
        y += bias.view(-1, 1, 1, 1)
        return torch.linalg.vector_norm(y, 2.0, 1, keepdim=True, dtype=dtype)

    of_modules = {
        "norm_silu": norm_silu,
        "residual_convolution": add_bias_and_residual,
        "normed_convolution": add_bias_and_measure,
    }
    for name, kernel in of_modules.items():
        module = SimpleNamespace(**{kernel.__name__: kernel})
        monkeypatch.setitem(sys.modules, f"wan_patches.ops.triton.{name}", module)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [3, 1])
@pytest.mark.parametrize("gate", [False, True])
def test_the_way_of_gpus_is_bit_identical(kind, frames, gate, request):
    """Without a gate, where biases are zero: a CPU's library adds others in another order."""
    vae = _build({**KINDS[kind], "base_dim": 64})
    if not gate:
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                torch.nn.init.zeros_(module.bias)
    latents, video = _latents(vae, frames, 5, 4), _video(vae, 4 * frames - 3, 3, 3)
    stock = _both(vae, latents, video)
    request.getfixturevalue("as_on_gpus")
    with wan_patches.enabled(["vae"], strict=True, gate=gate):
        tally.reset()
        first, second = _both(vae, latents, video), _both(vae, latents, video)
    assert all(_same(ours, theirs) for ours, theirs in zip((*first, *second), stock * 2, strict=True))
    ran = {way.op: way.form for way in tally.counted() if "kernel" in way.form}
    assert "RMS norm + SiLU" in ran
    if not gate:
        assert len(ran) == 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("tiling", [False, True])
def test_batches_slices_and_tiles(kind, slicing, tiling):
    vae = _build(KINDS[kind])
    vae.use_slicing = slicing
    if tiling:
        _tile(vae)
    _compare(vae, _latents(vae, 2, 7, 6, batch=2), _video(vae, 5, 7, 6, batch=2))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["tiled", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sliced", "residual", "divided"))]
)
@torch.no_grad()
def test_patches_can_be_toggled_in_the_middle_of_a_pass(kind, rounds, toggled):
    vae = _build({"residual": RESIDUAL, "divided": REAL}.get(kind, SMALL))
    vae.use_slicing = kind == "sliced"
    if kind == "tiled":
        _tile(vae)
    latents = _latents(vae, 2, 15, 6) if kind == "divided" else _latents(vae, 3, 6, 7, batch=2)

    def run():
        video = vae.decode(latents).sample
        return torch.cat((video.flatten(), vae.encode(video).latent_dist.parameters.flatten()))

    stock = run()
    for seed, found in enumerate(toggled(run, range(rounds))):
        assert torch.equal(found, stock), seed


@pytest.mark.usefixtures("one_thread")
def test_81_frames():
    vae = _build(SMALL)
    _compare(vae, _latents(vae, 21, 3, 4), _video(vae, 81, 3, 4))


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_real_channels_are_divided_and_bit_identical(dtype, monkeypatch):
    divided = []
    monkeypatch.setattr(division, "_divided", {})
    original = patch._can_be_divided
    monkeypatch.setattr(patch, "_can_be_divided", lambda *args: divided.append(original(*args)) or divided[-1])
    vae = _build(REAL, dtype)
    _compare(vae, _latents(vae, 2, 15, 6), _video(vae, 5, 28, 6))
    if not all(division._divided.values()):
        pytest.skip("convolutions add up in another order here: nothing is divided")
    assert divided == [True] * 4  # in the first pass, to know early, and in the second


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("what", ["weights", pytest.param("latents", marks=pytest.mark.slow)])
@torch.no_grad()
def test_channels_last(what, dtype):
    """Stock's convolutions go on in that layout, here and there, with other bits."""
    vae = _build(REAL, dtype)
    latents, video = _latents(vae, 2, 6, 6), _video(vae, 5, 6, 7)
    if what == "weights":
        for parameter in vae.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    else:
        latents = latents.to(memory_format=torch.channels_last_3d)
    _compare(vae, latents, video)


IMAGES = {"wan 2.1": REAL, "wan 2.2": {**RESIDUAL, "base_dim": 96, "decoder_base_dim": 96},
          "qwen image": REAL_QWEN}  # fmt: skip
_FIRST = "first frame's convolution"


def _ways_of_first_frames():
    return {way.form for way in tally.counted() if way.op == _FIRST}


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_convolved_by_the_last_tap_in_time(kind, dtype):
    vae = _build(IMAGES[kind], dtype)
    tally.reset()
    _compare(vae, _latents(vae, 1, 15, 12), _video(vae, 1, 15, 12))
    if not any(found for key, found in division._divided.items() if key[0].__name__ == "convolves_first"):
        pytest.skip("convolutions add up in another order here")
    assert "its last tap in time" in _ways_of_first_frames()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_is_remembered_after_the_last_frame(kind, monkeypatch):
    vae = _build(KINDS[kind])
    remembered = []
    original = FrameCaches.convolve

    def convolve(self, *args, **options):
        y = original(self, *args, **options)
        remembered.append((len(self) == vae._conv_num, self.ends, any(isinstance(kept, torch.Tensor) for kept in self)))
        return y

    monkeypatch.setattr(FrameCaches, "convolve", convolve)
    with wan_patches.enabled(["vae"]):
        vae.decode(_latents(vae, 1, 4, 4))
        assert remembered
        vae.encode(_video(vae, 1, 4, 4))
        assert {kept for _, _, kept in remembered} == {False}
        remembered.clear()
        vae.decode(_latents(vae, 2, 4, 4))
        vae.encode(_video(vae, 5, 4, 4))
    assert {kept for _, ends, kept in remembered if not ends} == {True}
    assert any(ends for _, ends, _ in remembered)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_who_watches_the_end_of_passes_sees_the_frames(kind, monkeypatch):
    vae = _build(KINDS[kind])
    seen, clear = [], type(vae).clear_cache

    def cleared(self):
        seen.append([None if isinstance(kept, str) else kept for kept in getattr(self, "_enc_feat_map", ())])
        seen.append([None if isinstance(kept, str) else kept for kept in getattr(self, "_feat_map", ())])
        clear(self)

    monkeypatch.setattr(type(vae), "clear_cache", cleared)
    vae.clear_cache()
    _both(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
    stock = [*seen]
    seen.clear()
    with wan_patches.enabled(["vae"]):
        _both(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
    entries = [
        (before, after) for old, new in zip(stock[-len(seen) :], seen) for before, after in zip(old, new, strict=True)
    ]
    assert any(before is not None for before, _ in entries)
    assert all((before is None) == (after is None) for before, after in entries)
    assert all(before is None or torch.equal(before, after) for before, after in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_derived_from_an_autoencoder_are_fast(kind):
    vae = _build(KINDS[kind])
    vae.__class__ = type("Derived", (type(vae),), {})
    _compare(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
    tally.reset()
    with wan_patches.enabled(["vae"]):
        _both(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
    assert {way.is_fast for way in tally.counted() if "bindings.vae:" in way.entry} == {True}


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """As many threads of torch, and no trial's result from before."""
    monkeypatch.setattr(division, "_divided", {})
    with using_threads(request.param):
        yield


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("channels", [(16, 384), (384, 192), (96, 96), (96, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_convolutions_of_first_frames_found_exact_are(channels, dtype):
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    conv = WanCausalConv3d(*channels, 3, padding=1).to(dtype)
    for height, width, channels_last in itertools.product((6, 24), (8, 50), (False, True)):
        x = division._in_format(torch.randn(1, channels[0], 1, height, width).to(dtype), channels_last)
        found = division.convolves_first(conv, (1, height, width), dtype, channels_last)
        padded = division._in_format(torch.nn.functional.pad(x, (1, 1, 1, 1)), channels_last)
        y = division.convolution_of_first(conv)(padded)
        stock = conv(x)
        assert y.shape == stock.shape
        assert not found or _same(y, stock)


@pytest.mark.parametrize("stride", [1, (1, 2, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_first_frames_of_whole_numbers_are_exact_on_every_processor(stride, channels_last):
    """Sums of small whole numbers are exact in any order, so that no trial decides."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    torch.manual_seed(0)
    conv = WanCausalConv3d(5, 7, 3, stride=stride, padding=1)
    for parameter in conv.parameters():
        parameter.copy_(torch.randint(-8, 9, parameter.shape))
    x = division._in_format(torch.randint(-8, 9, (2, 5, 1, 6, 8)).float(), channels_last)
    stock = conv(x)
    first = FrameCaches(1).convolve(0, x, division.convolution_of_first(conv), (1, 1), history=0)
    assert stock.unique().numel() > 50
    assert torch.equal(first, stock)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize(
    "what", ["image", "video", *(pytest.param(what, marks=pytest.mark.slow) for what in ("batch", "tiles"))]
)
@torch.no_grad()
def test_images_are_encoded_in_their_memory_format(what, dtype):
    """PIL images become tensors in channels-last memory, and stock's encoder goes on in that."""
    vae = _build(REAL, dtype)
    if what == "tiles":
        _tile(vae)
    height = 28 if what == "video" else 6  # 224 rows, which are divided
    video = _video(vae, 1 if what == "image" else 5, height, 7, 1 + (what == "batch"))
    video = video.to(memory_format=torch.channels_last_3d)
    stock = vae.encode(video).latent_dist.parameters
    with wan_patches.enabled(["vae"], strict=True):
        tally.reset()
        assert _same(vae.encode(video).latent_dist.parameters, stock)
        ways = {way: calls for way, calls in tally.counted().items() if "vae" in way.entry}
    assert stock.std() > 0
    assert sum(ways.values()) > 10
    assert all(way.is_fast for way in ways), ways


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[1::4])
@torch.no_grad()
def test_videos_can_have_any_strides(order):
    vae = _build(SMALL)
    video = _video(vae, 9, 2, 3, batch=2).permute(order).contiguous().permute([order.index(axis) for axis in range(5)])
    stock = vae.encode(video).latent_dist.parameters
    with wan_patches.enabled(["vae"], strict=True):
        assert _same(vae.encode(video).latent_dist.parameters, stock)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [
        ((256, 128), 1),
        ((512, 256), 1),
        pytest.param((1024, 512), 1, marks=pytest.mark.slow),
        ((96, 96), 3),
    ],
)
@torch.no_grad()
def test_convolutions_found_divisible_are_bit_identical(channels, kernel):
    """oneDNN adds up 1x1 convolutions in bf16 in an order that depends on the number of rows."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    conv = WanCausalConv3d(*channels, kernel, padding=kernel // 2).to(torch.bfloat16)
    for height, width in ((8, 14), (16, 28), (32, 56)):
        found = division.convolves_divided(conv, (1, 4, height, width), torch.bfloat16, False)
        x = torch.randn(1, channels[0], 4 + kernel - 1, height + kernel - 1, width + kernel - 1).to(torch.bfloat16)
        convolve = division.convolution(conv)
        parts = [convolve(x[:, :, t : t + 2 + kernel - 1].contiguous()) for t in (0, 2)]
        assert not found or torch.equal(convolve(x), torch.cat(parts, dim=2))


@pytest.mark.parametrize("channels", [64, 67])
@torch.no_grad()
def test_trial_input_distinguishes_summation_orders(channels):
    """On random numbers most results round to the same bf16 value in any order."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    conv = WanCausalConv3d(channels, 8, 3, padding=1).to(torch.bfloat16)
    like, x = division._cancelling(conv, (1, channels, 3, 10, 10), torch.bfloat16)
    reordered = torch.nn.functional.conv3d(x.flip(1), like.weight.flip(1))
    assert (division.convolution(like)(x) != reordered).float().mean() > 0.5


@torch.no_grad()
def test_inconclusive_trial_means_not_divisible(monkeypatch):
    """Zeros equal zeros in any order of adding up."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    conv3d = WanCausalConv3d(96, 8, 3, padding=1)
    ups = torch.nn.Conv2d(96, 48, 3, padding=1)
    downs = torch.nn.Conv2d(96, 96, 3, stride=2)

    def tried():
        division._divided.clear()
        yield division.convolves_divided(conv3d, (1, 4, 60, 104), torch.float32, False)
        yield division.resizes_divided(ups, (4, 96, 60, 104), torch.float32, False, True)
        yield division.resizes_divided(downs, (4, 96, 60, 104), torch.float32, False, False)
        yield division.convolves_first(conv3d, (1, 60, 104), torch.float32, False)

    right = division._cancelling
    seen = list(tried())

    def cancelling(*args):
        like, x = right(*args)
        return like, torch.zeros_like(x)

    monkeypatch.setattr(division, "_cancelling", cancelling)
    assert not any(tried())
    division._divided.clear()
    assert any(seen), "no trial says yes here, so none was turned"


@pytest.mark.parametrize("height", [13, 16])
def test_frames_too_small_for_bands_are_still_bit_identical(height):
    """Where ATen would give a part to another library than the whole."""
    vae = _build({**REAL, "base_dim": 48})
    _compare(vae, _latents(vae, 2, height, 4), _video(vae, 5, height, 4))


def test_bits_do_not_depend_on_what_was_decoded_before():
    vae = _build(SMALL)
    with wan_patches.enabled(["vae"]), torch.no_grad():
        first = vae.decode(_latents(vae, 3, 4, 4)).sample
        vae.decode(_latents(vae, 2, 6, 3, batch=2))
        assert torch.equal(first, vae.decode(_latents(vae, 3, 4, 4)).sample)


def test_no_memory_besides_the_result_is_kept(taken):
    vae = _build(SMALL)
    with wan_patches.enabled(["vae"]), torch.inference_mode():
        sample = vae.decode(_latents(vae, 2, 4, 4)).sample
        assert sample.untyped_storage().nbytes() == sample.numel() * sample.element_size()
    assert taken
    assert all(entry is None for entry in (*vae._feat_map, *vae._enc_feat_map))
    gone = [weakref.ref(entry) for entry in taken if entry not in (vae._feat_map, vae._enc_feat_map)]
    taken.clear()
    gc.collect()
    assert all(entry() is None or entry()._memory is None for entry in gone)


def test_a_failure_leaves_no_caches(monkeypatch):
    vae = _build(SMALL)
    monkeypatch.setattr(patch, "_upsample", lambda *args: 1 / 0)
    with wan_patches.enabled(["vae"]), torch.no_grad(), pytest.raises(ZeroDivisionError):
        vae.decode(_latents(vae, 2, 4, 4))
    assert all(entry is None for entry in vae._feat_map)


def test_tuples_are_returned_if_requested():
    vae = _build(SMALL)
    with torch.no_grad():
        stock = vae.decode(_latents(vae, 2, 4, 4), return_dict=False)
        with wan_patches.enabled(["vae"]):
            patched = vae.decode(_latents(vae, 2, 4, 4), return_dict=False)
            assert type(vae._decode(_latents(vae, 1, 4, 4), return_dict=False)) is tuple
    assert type(stock) is type(patched) is tuple
    assert torch.equal(stock[0], patched[0])


# Who keeps stock's code


def _hooked(vae):
    calls = []
    vae.decoder.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    return calls


def _own_forward(vae):
    calls, forward = [], vae.encoder.conv_in.forward
    vae.encoder.conv_in.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    return calls


def _other_module(vae):
    calls = []

    class Norm(type(vae.decoder.norm_out)):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    vae.decoder.norm_out.__class__ = Norm
    return calls


def _own_convolution(vae):
    calls, conv = [], vae.decoder.conv_out
    convolve = conv._conv_forward
    conv._conv_forward = lambda *args: (calls.append(1), convolve(*args) + 0.25)[1]
    return calls


@pytest.mark.parametrize("change", [_hooked, _own_forward, _other_module, _own_convolution])
def test_modified_module_is_called_as_often_as_in_stock(change):
    vae = _build(SMALL)
    calls = change(vae)
    latents, video = _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4)
    stock = _both(vae, latents, video)
    expected = len(calls)
    with wan_patches.enabled(["vae"]):
        patched = _both(vae, latents, video)
    assert expected > 0
    assert len(calls) == 2 * expected
    assert all(map(torch.equal, stock, patched))


def test_seamless_padding_is_kept():
    vae = _build(SMALL)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    _compare(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))


@pytest.mark.parametrize("cls", ["WanCausalConv3d", "WanRMS_norm", "WanUpsample", "Conv2d", "Conv3d", "SiLU"])
def test_classes_modified_later_are_called(cls, monkeypatch):
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    kind = getattr(wan, cls, None) or getattr(torch.nn, cls)
    vae, forward, calls = _build(SMALL), kind.forward, []
    with wan_patches.enabled(["vae"]):
        monkeypatch.setattr(kind, "forward", lambda *args, **more: (calls.append(1), forward(*args, **more))[1])
        patched = _both(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
        count = len(calls)
    stock = _both(vae, _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4))
    assert count > 0
    assert len(calls) == 2 * count
    assert all(map(torch.equal, stock, patched))


def test_weights_of_several_dtypes_get_stock_code():
    vae = _build(SMALL)
    vae.post_quant_conv.bfloat16()
    vae.decoder.conv_in.bfloat16()
    latents = _latents(vae, 2, 4, 4).bfloat16()
    with torch.no_grad():
        stock = vae.decode(latents).sample
        with wan_patches.enabled(["vae"]):
            assert torch.equal(vae.decode(latents).sample, stock)


def test_fake_tensors_have_the_right_shapes(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(division, "_divided", {})
    vae = _build({**SMALL, "base_dim": 48})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), wan_patches.enabled(["vae"]):
        assert vae.decode(torch.empty(1, 4, 2, 16, 16)).sample.shape == (1, 3, 5, 128, 128)


def test_saved_autoencoder_does_not_need_this_package():
    vae = _build(SMALL)
    with wan_patches.enabled(["vae"]), torch.no_grad():
        vae.decode(_latents(vae, 1, 4, 4))
        assert type(vae._feat_map) is FrameCaches
        assert b"wan_patches" not in pickle.dumps(vae)


def test_only_the_modified_half_keeps_stock_code():
    vae = _build(SMALL)
    _own_forward(vae)
    with wan_patches.enabled(["vae"]), torch.no_grad():
        vae.clear_cache()
        assert type(vae._feat_map) is FrameCaches
        assert type(vae._enc_feat_map) is list


def test_gradients_come_from_stock_code(taken):
    vae = _build(SMALL)
    latents = _latents(vae, 2, 4, 4)
    vae.decode(latents).sample.square().mean().backward()
    stock = {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}
    vae.zero_grad()
    with wan_patches.enabled(["vae"]):
        vae.decode(latents).sample.square().mean().backward()
    assert stock
    assert not taken
    assert all(torch.equal(grad, dict(vae.named_parameters())[name].grad) for name, grad in stock.items())


def test_autocast_and_global_hooks_get_stock_code(taken):
    vae = _build(SMALL)
    with wan_patches.enabled(["vae"]), torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vae.decode(_latents(vae, 2, 4, 4))
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            vae.decode(_latents(vae, 2, 4, 4))
        finally:
            handle.remove()
        assert not taken
        vae.decode(_latents(vae, 2, 4, 4))
        assert taken


def test_fallback_to_stock_code_is_logged(caplog):
    vae = _build(SMALL)
    _hooked(vae)
    patch._log_fallback.cache_clear()
    with wan_patches.enabled(["vae"]), torch.no_grad(), caplog.at_level(logging.INFO, "wan_patches"):
        vae.decode(_latents(vae, 2, 4, 4))
        vae.decode(_latents(vae, 2, 4, 4))
    said = [record.getMessage() for record in caplog.records if "stock code" in record.getMessage()]
    assert said == ["AutoencoderKLWan runs stock code: a WanCausalConv3d has hooks or methods of its own"]


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_autoencoder_without_encoder_or_decoder(part):
    """Who only decodes may have thrown the encoder away."""
    vae = _build(SMALL)
    latents, video = _latents(vae, 2, 4, 4), _video(vae, 5, 4, 4)
    run = (
        (lambda: vae.encode(video).latent_dist.parameters)
        if part == "decoder"
        else (lambda: vae.decode(latents).sample)
    )
    setattr(vae, part, None)
    with torch.no_grad():
        stock = run()
        with wan_patches.enabled(["vae"]):
            assert torch.equal(stock, run())


def test_copies_and_disabling_between_passes():
    vae = _build(SMALL)
    latents = _latents(vae, 2, 4, 4)
    with torch.no_grad():
        stock = vae.decode(latents).sample
        with wan_patches.enabled(["vae"]):
            vae.decode(latents)
            twin = copy.deepcopy(vae)
        assert torch.equal(stock, twin.decode(latents).sample)
        assert torch.equal(stock, vae.decode(latents).sample)
        assert type(vae._feat_map) is list


def test_a_compiled_decoder_keeps_stock_code(taken):
    vae = _build(SMALL)
    latents = _latents(vae, 2, 4, 4)
    with torch.no_grad():
        stock = vae.decode(latents).sample
        vae.decoder = torch.compile(vae.decoder, backend="eager")
        with wan_patches.enabled(["vae"]):
            patched = vae.decode(latents).sample
    assert torch.equal(stock, patched)
    assert len(taken) == len([entry for entry in taken if len(entry) == vae._enc_conv_num])
    torch._dynamo.reset()


def test_user_random_state_is_unchanged():
    vae = _build(REAL)
    state = torch.random.get_rng_state()
    division._divided.clear()
    with wan_patches.enabled(["vae"]), torch.no_grad():
        vae.decode(torch.zeros(1, 16, 2, 14, 4))
    assert division._divided
    assert torch.equal(state, torch.random.get_rng_state())
