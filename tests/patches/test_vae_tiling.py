"""Tiled encoding and decoding by installed autoencoders, patched in place, against stock."""

from __future__ import annotations

import pytest
import torch

from wan_patches.patches.vae_tiling import _AUTOENCODERS, PATCHES
from wan_patches.patching.registry import Registry
from wan_patches.patching.status import ACTIVE
from wan_patches.testing.families import FAMILIES, available

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
if not hasattr(autoencoders.AutoencoderKLWan, "blend_v"):
    pytest.skip("this diffusers has no tiling for Wan's VAE", allow_module_level=True)

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def registry():
    registry = Registry(PATCHES)
    yield registry
    registry.disable()


@pytest.fixture
def fast(monkeypatch):
    """How often the fast way was taken."""
    from wan_patches.ops import tiling

    calls: list[int] = []
    real = tiling.blend
    monkeypatch.setattr(tiling, "blend", lambda *args: calls.append(args[3]) or real(*args))
    return calls


def vae(family="wan_t2v", dtype=torch.float32, **tiles):
    made = FAMILIES[family].build(vae_dtype=dtype).vae
    made.enable_tiling(**(tiles or {"tile_sample_min_height": 64, "tile_sample_min_width": 80,
                                    "tile_sample_stride_height": 48, "tile_sample_stride_width": 48}))  # fmt: skip
    return made


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def both(registry, call):
    stock = call()
    with registry.enabled(strict=True) as status:
        of_wan = [report.state for report in status.of("vae") if report.module == autoencoders.__name__]
        assert of_wan == [ACTIVE]
        patched = call()
    return stock, patched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 15, 21), (3, 9, 11), (2, 20, 8)])
@torch.no_grad()
def test_tiled_decode_has_the_bits_of_stock(frames, height, width, dtype, registry, fast):
    model, latents = vae(dtype=dtype), random(1, 16, frames, height, width, dtype=dtype)
    stock, patched = both(registry, lambda: model.decode(latents).sample)
    assert torch.equal(stock, patched)
    assert fast


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_tiled_encode_has_the_bits_of_stock(dtype, registry, fast):
    model, video = vae(dtype=dtype), random(2, 3, 5, 104, 120, dtype=dtype)
    stock, patched = both(registry, lambda: model.encode(video).latent_dist.parameters)
    assert torch.equal(stock, patched)
    assert fast


@pytest.mark.skipif("wan22_ti2v" not in available(), reason="not in this diffusers")
@torch.no_grad()
def test_the_residual_vae_too(registry, fast):
    model = vae("wan22_ti2v")
    tile, stride = 8 * model.spatial_compression_ratio, 6 * model.spatial_compression_ratio
    model.enable_tiling(tile, tile, stride, stride)
    latents = random(1, 48, 2, 9, 11)
    try:
        model.decode(latents)
    except RuntimeError as error:  # diffusers 0.35 does not tell the decoder which frames are the first
        pytest.skip(f"stock cannot do it: {error}")
    stock, patched = both(registry, lambda: model.decode(latents).sample)
    assert torch.equal(stock, patched)
    assert set(fast) == {-2, -1}


def _model(module):
    """The class of an autoencoder, if this diffusers has its methods."""
    found = pytest.importorskip(f"diffusers.models.autoencoders.{module}")
    model = getattr(found, _AUTOENCODERS[module])
    if not hasattr(model, "blend_v"):
        pytest.skip("this diffusers blends no tiles here")
    return model


#: Autoencoders of images, whose tiles have no frames.
IMAGES = {"autoencoder_dc", "autoencoder_kl", "autoencoder_kl_flux2", "autoencoder_kl_hunyuanimage",
          "autoencoder_kl_kvae", "consistency_decoder_vae"}  # fmt: skip


@pytest.mark.parametrize("method", ["blend_v", "blend_h"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", _AUTOENCODERS)
def test_every_autoencoder_blends_with_the_bits_of_stock(module, dtype, method, registry, fast):
    blend = getattr(_model(module), method)
    shape = (2, 3, 24, 36) if module in IMAGES else (2, 3, 5, 24, 36)
    a, b = random(*shape, dtype=dtype), random(*shape, dtype=dtype).flip(0)

    def call():
        tile = b.clone()
        found = blend(None, a, tile, 20)
        assert found is tile
        return tile

    stock, patched = both(registry, call)
    assert not torch.equal(stock, b)
    assert torch.equal(stock, patched)
    assert fast == [-2 if method == "blend_v" else -1]


@pytest.mark.parametrize("module", ["autoencoder_kl", "autoencoder_kl_hunyuan_video"])
def test_tiles_with_other_axes_use_stock(module, registry, fast):
    """Those of a video, for a method that indexes images, are blended along another axis."""
    model = _model(module)
    shape = (1, 2, 6, 7, 8) if module == "autoencoder_kl" else (1, 2, 6, 7)

    def call():
        try:
            return model.blend_v(None, random(*shape), random(*shape) + 1, 4)
        except IndexError as error:
            return str(error)

    stock, patched = both(registry, call)
    assert torch.equal(stock, patched) if isinstance(stock, torch.Tensor) else stock == patched
    assert not fast


def test_with_gradients_stock_runs(registry, fast, monkeypatch):
    model, latents = vae(), random(1, 16, 1, 9, 11)
    model.requires_grad_(False)
    gradients = []

    def run():
        z = latents.clone().requires_grad_()
        # stock's in-place fade of what autograd has kept: the sum differentiates, as it does in stock
        model.decode(z).sample.sum().backward()
        gradients.append(z.grad)
        return z.grad

    stock, patched = both(registry, run)
    assert torch.equal(stock, patched)
    assert not fast


@pytest.mark.parametrize(
    ("a", "b", "extent"),
    [
        (random(1, 1, 1, 8, 8).double(), random(1, 1, 1, 8, 8).double(), 4),
        (random(1, 1, 1, 8, 8), random(1, 1, 1, 8, 8).bfloat16(), 4),
        (random(1, 1, 1, 8, 8), random(2, 1, 1, 8, 8), 4),
        (random(1, 1, 1, 8, 8), random(1, 1, 1, 8, 8), 4.0),
        (random(1, 1, 8, 8), random(1, 1, 8, 8), 4),
        (random(1, 1, 1, 8, 8, dtype=torch.int32), random(1, 1, 1, 8, 8, dtype=torch.int32), 4),
        (random(1, 1, 1, 8, 8).to("meta"), random(1, 1, 1, 8, 8).to("meta"), 4),
    ],
)
@pytest.mark.parametrize("method", ["blend_v", "blend_h"])
def test_all_other_input_uses_stock(method, a, b, extent, registry, fast):
    def call():
        try:
            return getattr(autoencoders.AutoencoderKLWan, method)(None, a, b.clone(), extent)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    stock, patched = both(registry, call)
    assert not fast
    if isinstance(stock, str) or stock.is_meta:
        assert type(stock) is type(patched)
    else:
        assert torch.equal(stock, patched)


@pytest.mark.parametrize("method", ["blend_v", "blend_h"])
def test_tiles_that_share_memory_use_stock(method, registry, fast):
    def call():
        whole = random(1, 2, 3, 24, 24)
        blend = getattr(autoencoders.AutoencoderKLWan, method)
        return blend(None, whole[..., :16, :16], whole[..., 8:, 8:], 12)

    stock, patched = both(registry, call)
    assert torch.equal(stock, patched)
    assert not fast


def test_compiled_blends_use_stock(registry, fast):
    def call():
        compiled = torch.compile(
            lambda a, b: autoencoders.AutoencoderKLWan.blend_v(None, a, b, 4), backend="eager", fullgraph=True
        )
        return compiled(random(1, 2, 3, 8, 8), random(1, 2, 3, 8, 8) + 1)

    stock, patched = both(registry, call)
    assert torch.equal(stock, patched)
    assert not fast


def test_disable_restores_stock(registry):
    method = autoencoders.AutoencoderKLWan.blend_v
    before = method.__code__
    registry.enable()
    assert method.__code__ is not before
    registry.disable()
    assert method.__code__ is before
