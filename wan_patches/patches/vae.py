"""Wan's video autoencoder: what lies between its convolutions, with the bits of stock.

`clear_cache` begins every pass over a video (tiled, sliced, or of a tile on some rank). Where the encoder or decoder
is as diffusers builds it, it puts a `FrameCaches` in the place of stock's list; the blocks that are given one
take the short way. Hooks, compiled or quantised modules, adapters, autograd and autocast get stock's list, and with
it stock's code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

from wan_patches.bindings.forwards import has_global_hooks, is_hooked
from wan_patches.bindings.originals import are_torchs, has_librarys, is_librarys, is_watched
from wan_patches.patching import tally
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.fingerprints import AUTOENCODER, TEXTS, relied_on
from wan_patches.patching.objects import own_methods
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body, Replace, fingerprint

logger = logging.getLogger("wan_patches")

_HERE = "wan_patches.patches.vae"
_CLONE = "_wan_patches_vae_unchanged"
_SHORT = "shared windows, no clones"
_STEP = 2  # frames at a time in the largest layers: half of stock's
_ROWS = 16  # that are upsampled at a time there

# target, and the function here that runs in its place
_REPLACED = (
    ("AutoencoderKLWan.clear_cache", "clear_cache"),
    ("AutoencoderKLWan._decode", "decode"),
    ("WanDecoder3d.forward", "decode_chunk"),
    ("WanEncoder3d.forward", "encode_chunk"),
    ("WanResidualBlock.forward", "residual_block"),
    ("WanResample.forward", "resample"),
)
_ARGUMENTS = {
    "clear_cache": "self",
    "decode": "self, z, return_dict",
    "decode_chunk": "self, x, feat_cache, feat_idx, first_chunk",
    "encode_chunk": "self, x, feat_cache, feat_idx",
    "residual_block": "self, x, feat_cache, feat_idx",
    "resample": "self, x, feat_cache, feat_idx",
}


def _replaced(qualname: str, function: str) -> Target:
    call = f"return _wan_patches_vae_{function}(_wan_patches_stock_vae_{function}, {_ARGUMENTS[function]})"
    return Target(qualname, (Body(replacements=tuple((text, call) for text in TEXTS[AUTOENCODER][qualname])),))


PATCHES = (
    Patch(
        name="vae",
        module=AUTOENCODER,
        targets=(
            *(_replaced(*entry) for entry in _REPLACED),
            *(
                Target(f"{block}.forward", (Replace("x.clone()", f"{_CLONE}(x, feat_cache)"),))
                for block in ("WanResidualUpBlock", "WanResidualDownBlock")
            ),
        ),
        calls={
            **{f"_wan_patches_vae_{function}": f"{_HERE}:{function}" for _, function in _REPLACED},
            **{f"_wan_patches_stock_vae_{function}": STOCK for _, function in _REPLACED},
            _CLONE: f"{_HERE}:unchanged",
        },
        implementations={
            "CPUs": "norms a few rows at a time, shared windows, two frames a step where that is exact",
            "CUDA with Triton": "shared windows, and norm and SiLU in a kernel",
            "other devices": "shared windows in place of joined, padded and cloned tensors",
        },
        requires=relied_on(
            AUTOENCODER,
            "WanCausalConv3d.__init__",
            "WanCausalConv3d.forward",
            "WanRMS_norm.forward",
            "WanUpsample.forward",
            "WanAttentionBlock.forward",
            "WanMidBlock.forward",
            "WanUpBlock.forward",
            "WanResidualUpBlock.forward",
            "WanResidualDownBlock.forward",
            "DupUp3D.forward",
            "AvgDown3D.forward",
        ),
    ),
)


# A pass over a video


def clear_cache(stock: Callable[..., None], vae: Any) -> None:
    """Begins a pass: gives the encoder and the decoder `FrameCaches` where they can use them, else stock's lists."""
    import torch

    stock(vae)
    if torch.compiler.is_compiling():
        return
    from wan_patches.ops.vae import FrameCaches

    for coder, caches in ((vae.decoder, "_feat_map"), (vae.encoder, "_enc_feat_map")):
        reason = _reason_against(coder) if coder is not None else "there is none"
        if reason is None:
            setattr(vae, caches, FrameCaches(len(getattr(vae, caches))))
        else:
            _tell(type(vae).__name__, reason)


def decode(stock: Callable[..., Any], vae: Any, z: Any, return_dict: bool = True) -> Any:
    """Stock's untiled decode, whose chunks are written where they belong in the video at once.

    z: `(batch, channels, latent frames, height, width)`; the video is `(batch, 3, frames, height, width)` in [-1, 1].
    """
    import torch

    if torch.compiler.is_compiling() or vae.use_tiling:
        return stock(vae, z, return_dict)
    if (reason := _reason_against_decode(vae, z)) is not None:
        tally.count("decode", "", reason)
        return stock(vae, z, return_dict)
    tally.count("decode", "chunks written where they belong")
    from diffusers.models.autoencoders.vae import DecoderOutput

    frames = z.shape[2]
    video: Any = None
    first: Any = None
    end = 0
    with contextlib.closing(chunks(vae, z)) as decoded:
        for chunk in decoded:
            if first is None:
                first = chunk.clamp_(min=-1.0, max=1.0)
                continue
            if video is None:  # only the second chunk tells how many frames all others have
                end = first.shape[2]
                length = end + (frames - 1) * chunk.shape[2]
                video = chunk.new_empty((*chunk.shape[:2], length, *chunk.shape[3:]))
                video[:, :, :end] = first
            start, end = end, end + chunk.shape[2]
            torch.clamp(chunk, min=-1.0, max=1.0, out=video[:, :, start:end])
    video = first if video is None else video
    return DecoderOutput(sample=video) if return_dict else (video,)


def chunks(vae: Any, z: Any) -> Generator[Any, None, None]:
    """What stock's untiled decode joins and clamps: the frames of one latent frame of `z` after another. Close it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    try:
        latents = vae.post_quant_conv(z)
        caches = vae._feat_map  # of this pass: between two chunks somebody may begin another
        for i in range(latents.shape[2]):
            vae._conv_idx = index = [0]
            is_first = {"first_chunk": True} if i == 0 else {}
            chunk = vae.decoder(latents[:, :, i : i + 1], feat_cache=caches, feat_idx=index, **is_first)
            if vae.config.patch_size is not None:
                chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
            yield chunk
            del chunk  # before the next is made
    finally:
        vae.clear_cache()  # also where a chunk was too much for the device


def decode_chunk(
    stock: Callable[..., Any], decoder: Any, x: Any, feat_cache: Any, feat_idx: list[int], first_chunk: bool
) -> Any:
    """One latent frame to its frames. What follows the last upsampling in time goes a few frames at a time."""
    if not _begins_fast(feat_cache, decoder, x, _reason_against_latents):
        return stock(decoder, x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    blocks = list(decoder.up_blocks)
    temporal = [i for i, block in enumerate(blocks) if _changes_frames(block)]
    border = temporal[-1] + 1 if temporal else 0

    layers = [layer for block in blocks[border:] for layer in _layers(block)]

    def tail(x: Any, caches: Any, index: list[int]) -> Any:
        for layer in layers:
            x = layer(x, feat_cache=caches, feat_idx=index)
        return _causal(decoder.conv_out, caches, index, x, decoder.norm_out)

    x = _causal(decoder.conv_in, feat_cache, feat_idx, x)
    x = decoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in blocks[:border]:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    return _in_steps(tail, (*blocks[border:], decoder.conv_out), x, 2 ** len(temporal), feat_cache, feat_idx)


def encode_chunk(stock: Callable[..., Any], encoder: Any, x: Any, feat_cache: Any, feat_idx: list[int]) -> Any:
    """One or four frames to a latent frame. What precedes the first downsampling in time goes a few at a time."""
    if not _begins_fast(feat_cache, encoder, x, _reason_against_video):
        return stock(encoder, x, feat_cache=feat_cache, feat_idx=feat_idx)
    blocks = list(encoder.down_blocks)
    temporal = [i for i, block in enumerate(blocks) if _changes_frames(block)]
    border = temporal[0] if temporal else 0

    def run(blocks: list[Any], x: Any, caches: Any, index: list[int]) -> Any:
        for block in blocks:
            x = block(x) if _is_attention(block) else block(x, feat_cache=caches, feat_idx=index)
        return x

    x = _causal(encoder.conv_in, feat_cache, feat_idx, x)
    x = _in_steps(functools.partial(run, blocks[:border]), blocks[:border], x, 2 ** len(temporal), feat_cache, feat_idx)
    x = run(blocks[border:], x, feat_cache, feat_idx)
    x = encoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return _causal(encoder.conv_out, feat_cache, feat_idx, x, encoder.norm_out)


def residual_block(stock: Callable[..., Any], block: Any, x: Any, feat_cache: Any, feat_idx: list[int]) -> Any:
    """Norm, SiLU, convolution, twice, and the shortcut added where the result lies."""
    if not _noted("residual block", _reason_against_caches(feat_cache)):
        return stock(block, x, feat_cache, feat_idx)
    shortcut = x if block.in_dim == block.out_dim else _convolution(block.conv_shortcut)(x)
    y = _causal(block.conv1, feat_cache, feat_idx, x, norm=block.norm1)
    return _causal(block.conv2, feat_cache, feat_idx, y, norm=block.norm2, add=shortcut, overwrite=True)


def resample(stock: Callable[..., Any], module: Any, x: Any, feat_cache: Any, feat_idx: list[int]) -> Any:
    """Up or down by two in height and width, and in time where the mode says so."""
    reason = "there is nothing to resample" if module.mode == "none" else _reason_against_caches(feat_cache)
    if not _noted("resample", reason):
        return stock(module, x, feat_cache, feat_idx)
    from wan_patches.ops.vae import is_channels_last

    frames = x.transpose(1, 2)
    up = module.mode.startswith("up")
    if module.mode == "upsample3d":
        frames = _upsample_time(module.time_conv, x, feat_cache, feat_idx)
    conv, images = module.resample[1], frames.flatten(0, -4)
    divided = feat_cache.divided
    if x.is_cpu and not divided and images.shape[0] > 1:
        divided = _resizes_divided(conv, tuple(images.shape), x.dtype, is_channels_last(images), up)
    if divided:
        y = _resize_divided(conv, images, up, feat_cache)
    else:
        y = conv((_upsample if up else _pad)(images, feat_cache))
    y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return _downsample_time(module.time_conv, y, feat_cache, feat_idx) if module.mode == "downsample3d" else y


def unchanged(x: Any, feat_cache: Any) -> Any:
    """What stock clones although nothing changes it."""
    return x if _is_fast(feat_cache) else x.clone()


# Layers


def _causal(conv: Any, caches: Any, index: list[int], x: Any, norm: Any = None, **options: Any) -> Any:
    """A causal convolution of three taps in time, after a norm and SiLU where one is given."""
    _, left, _, above, _, _ = conv._padding
    activation = None if norm is None else functools.partial(_normed, norm)
    index[0] += 1
    return caches.convolve(index[0] - 1, x, _convolution(conv), (above, left), activation=activation, **options)


def _normed(norm: Any, x: Any) -> Any:
    """`WanRMS_norm` and SiLU."""
    import torch
    import torch.nn.functional as F

    if x.is_cpu:
        return F.silu(norm(x), inplace=True)
    from wan_patches.ops.norm_silu import norm_silu

    bias = norm.bias if isinstance(norm.bias, torch.Tensor) else None
    plain = functools.partial(_plain_norm, norm)
    return norm_silu(x, plain, norm.scale, norm.gamma, bias, _normalizes_in_fp32())


def _plain_norm(norm: Any, x: Any, gamma: Any, bias: Any) -> Any:
    """`norm(x)`, or with other weights, which the gate may want to try."""
    from torch.nn import Parameter

    if gamma is not norm.gamma:
        norm = copy.copy(norm)  # another thread may be in this one
        weights = {"gamma": gamma, "bias": bias}
        norm._parameters = {name: Parameter(weights[name], False) for name in norm._parameters}
    return norm(x)


@functools.lru_cache(maxsize=1)
def _normalizes_in_fp32() -> bool:
    """Whether the installed `WanRMS_norm` takes lengths and quotients of half dtypes in fp32."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    forward: Any = WanRMS_norm.forward
    return TEXTS[AUTOENCODER]["WanRMS_norm.forward"].get(fingerprint(forward)) == "0.38"


def _convolution(conv: Any, padding: Any = 0) -> Callable[[Any], Any]:
    """The convolution itself, of what is joined and padded."""
    import torch.nn.functional as F

    convolve: Any = F.conv3d if conv.weight.dim() == 5 else F.conv2d
    return lambda x: convolve(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def _upsample_time(conv: Any, x: Any, caches: Any, index: list[int]) -> Any:
    """`(batch, frames, 2, channels, height, width)`, or without the 2 in the first pass, which leaves time alone."""
    from wan_patches.ops.vae import interleave

    if caches[index[0]] is None:
        caches[index[0]] = "Rep"  # stock's word
        index[0] += 1
        return x.transpose(1, 2)
    return interleave(_causal(conv, caches, index, x))


def _upsample(frames: Any, caches: Any) -> Any:
    from wan_patches.ops.vae import is_channels_last, upsample

    *leading, height, width = frames.shape
    return upsample(frames, caches.shared((*leading, 2 * height, 2 * width), frames, is_channels_last(frames)))


def _resize_divided(conv: Any, images: Any, up: bool, caches: Any) -> Any:
    """One image at a time, and up in bands of rows: `(images, channels, height, width)` to twice or half the size."""
    import torch

    from wan_patches.ops.vae import upsampled_bands

    if not up:
        return torch.cat([conv(_pad(image, caches)) for image in images.split(1)])
    count, _, height, width = images.shape
    y = images.new_empty((count, conv.out_channels, 2 * height, 2 * width))
    convolve = _convolution(conv, (0, conv.padding[1]))  # rows have their neighbours above and below with them
    for image, out in zip(images.split(1), y.split(1)):
        for rows, band in upsampled_bands(image, _ROWS, caches):
            out[..., rows, :] = convolve(band)
    return y


def _pad(frames: Any, caches: Any) -> Any:
    """A row of zeros below and a column to the right."""
    from wan_patches.ops.vae import is_channels_last

    *leading, height, width = frames.shape
    padded = caches.shared((*leading, height + 1, width + 1), frames, is_channels_last(frames))
    padded[..., height, :] = 0
    padded[..., width] = 0
    padded[..., :height, :width] = frames
    return padded


def _downsample_time(conv: Any, x: Any, caches: Any, index: list[int]) -> Any:
    """Frames by a convolution with a stride of two over them and the last of the pass before; not in the first."""
    import torch

    before = caches[index[0]]
    caches[index[0]] = (x if before is None else x[:, :, -1:]).clone()
    index[0] += 1
    return x if before is None else _convolution(conv)(torch.cat([before[:, :, -1:], x], dim=2))


def _layers(block: Any) -> list[Any]:
    """What an up block runs one after another: called one by one, they leave its own input to be freed."""
    if hasattr(block, "avg_shortcut"):
        return [block]
    return [*block.resnets, *(block.upsamplers or ())]


def _changes_frames(block: Any) -> bool:
    return any(hasattr(module, "time_conv") for module in block.modules())


def _is_attention(block: Any) -> bool:
    return hasattr(block, "to_qkv")


# A few frames and rows at a time


def _in_steps(run: Callable[..., Any], modules: Any, x: Any, frames: int, caches: Any, index: list[int]) -> Any:
    """`run(x, caches, index)` of modules that keep the frames, divided where that gives the same bits.

    frames: of `x` in every pass but the first, which has one.
    """
    from wan_patches.ops.vae import in_steps

    first, is_first_pass = index[0], caches[index[0]] is None
    # asked in the first pass already: there is room for what is tried, as most caches are empty
    divided = _can_be_divided(modules, x, frames if is_first_pass else x.shape[2])
    if is_first_pass or not divided:
        return run(x, caches, index)

    def rewind() -> None:
        index[0], caches.continues = first, True

    caches.divide()
    try:
        return in_steps(lambda x: run(x, caches, index), x, _STEP, rewind)
    finally:
        caches.unite()


def _can_be_divided(modules: Any, x: Any, frames: int) -> bool:
    """Whether so many frames and rows of `x` as are taken at a time have the bits of the whole.

    On a CPU a convolution's way of adding up mostly does not depend on how many frames and rows there are, as long as
    ATen gives both to the same library; tried here for each convolution and shape. On accelerators libraries
    choose an algorithm by the shape: there nothing is divided.
    """
    from torch import nn

    from wan_patches.ops.vae import is_channels_last

    if not x.is_cpu or frames <= _STEP or frames % _STEP:
        return False
    batch, _, _, height, width = x.shape
    formats = {False, is_channels_last(x)}  # of some windows no more than a part is in channels-last memory
    for module in (part for block in modules for part in block.modules()):
        if _is_attention(module):
            return False
        if hasattr(module, "resample"):
            up, conv = module.mode.startswith("up"), module.resample[1]
            shape = (batch * frames, conv.in_channels, height, width)
            if not all(_resizes_divided(conv, shape, x.dtype, channels_last, up) for channels_last in formats):
                return False
            height, width = (2 * height, 2 * width) if up else (height // 2, width // 2)
        elif isinstance(module, nn.Conv3d):
            shape = (batch, frames, height, width)
            if not all(_convolves_divided(module, shape, x.dtype, channels_last) for channels_last in formats):
                return False
    return True


_divided: dict[Any, bool] = {}


def _remembered(try_it: Callable[..., bool]) -> Callable[..., bool]:
    """Tries once for a convolution's form, a shape and what else can change the algorithm."""

    @functools.wraps(try_it)
    def ask(conv: Any, shape: Any, dtype: Any, channels_last: bool, *more: Any) -> bool:
        import torch

        settings = (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled)
        form = (conv.weight.shape, conv.stride, conv.padding, conv.bias is None)
        key = (try_it, form, tuple(shape), dtype, channels_last, *more, *settings)
        if key not in _divided:
            _divided[key] = try_it(conv, shape, dtype, channels_last, *more)
        return _divided[key]

    return ask


@_remembered
def _convolves_divided(conv: Any, shape: Any, dtype: Any, channels_last: bool) -> bool:
    """Whether a causal convolution to `(batch, frames, height, width)` has the same bits in steps and bands."""
    import torch

    from wan_patches.ops.vae import bands, least_rows

    batch, frames, height, width = shape
    before, above, beside = (size - 1 for size in conv.kernel_size)
    least = least_rows(batch * conv.in_channels * (before + _STEP))
    if height < least:
        return False
    size = (batch, conv.in_channels, before + frames, height + above, width + beside)
    conv, window = _cancelling(conv, size, dtype)
    window = _laid(window, channels_last)
    convolve = _convolution(conv)
    whole = convolve(window)
    edges = bands(height, least) if above else [0, height]
    return _is_rounding(whole) and all(
        torch.equal(
            convolve(_laid(window[:, :, : before + _STEP, top : bottom + above], channels_last)),
            whole[:, :, :_STEP, top:bottom],
        )
        for top, bottom in _of_each_size(edges)
    )


@_remembered
def _resizes_divided(conv: Any, shape: Any, dtype: Any, channels_last: bool, up: bool) -> bool:
    """The same of resampling `(images, channels, height, width)`: one image at a time, and up in bands."""
    import torch

    from wan_patches.ops.vae import bands, least_rows

    images, channels, height, width = shape
    rows, columns = (2 * min(height, _ROWS), 2 * width) if up else (height + 1, width + 1)
    if rows < least_rows(channels * columns):
        return False
    # up: twice as many rows, with zeros above and below them; down: one more row
    size = (2 * height + 2, 2 * width) if up else (height + 1, width + 1)
    conv, frames = _cancelling(conv, (images, channels, *size), dtype)
    if not up:
        convolve, frames = _convolution(conv), _laid(frames, channels_last)
        whole = convolve(frames)
        return _is_rounding(whole) and torch.equal(whole[:1], convolve(frames[:1]))
    frames[..., 0, :] = frames[..., -1, :] = 0
    whole = _convolution(conv, conv.padding)(_laid(frames[..., 1:-1, :], channels_last))
    convolve = _convolution(conv, (0, conv.padding[1]))
    return _is_rounding(whole) and all(
        torch.equal(
            convolve(_laid(frames[:1, :, 2 * top : 2 * bottom + 2], channels_last)),
            whole[:1, :, 2 * top : 2 * bottom],
        )
        for top, bottom in _of_each_size(bands(height, _ROWS))
    )


def _laid(x: Any, channels_last: bool) -> Any:
    """`x` without gaps, in that memory format."""
    import torch

    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last if channels_last else torch.contiguous_format)


def _of_each_size(edges: list[int]) -> list[tuple[int, int]]:
    """Of bands with these borders, one of each height."""
    return list({bottom - top: (top, bottom) for top, bottom in itertools.pairwise(edges)}.values())


def _cancelling(conv: Any, shape: Any, dtype: Any) -> tuple[Any, Any]:
    """Such a convolution and its input, in which products cancel: what is left is rounding.

    In bf16 another order of adding up changes one result in ten thousand; here it changes most. Which channels cancel
    is drawn by lot, and they are of several magnitudes: some processors add up channels in blocks, and of two blocks
    that mirror each other nothing is left.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(0)  # the user's random state is not ours to move
    half = conv.in_channels // 2

    def random(*sizes: int) -> Any:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    weight, row = random(*conv.weight.shape), random(conv.in_channels, shape[-1])
    lots = torch.randperm(conv.in_channels, generator=generator, device="cpu")
    ones, others = lots[:half], lots[half : 2 * half]
    row[ones] *= (2.0 ** torch.randint(-6, 7, (half, 1), generator=generator, device="cpu")).to(dtype)
    weight[:, others] = -weight[:, ones]
    row[others] = row[ones]
    row[lots[2 * half :]] = 0
    x = row.view(1, shape[1], *(1 for _ in shape[2:-1]), shape[-1]).expand(shape).contiguous()
    bias = None if conv.bias is None else torch.zeros(conv.out_channels, dtype=dtype, device="cpu")
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    return SimpleNamespace(weight=weight, bias=bias, **options), x


def _is_rounding(result: Any) -> bool:
    """Whether anything is left of what cancels: zeros, which would be equal to zeros, tell nothing."""
    return bool(4 * result.count_nonzero() > result.numel())


# Who takes the short way


def _noted(op: str, reason: str | None) -> bool:
    """Counts a call that takes the short way unless there is a reason; says whether it does."""
    tally.note(op, "" if reason else _SHORT, reason or "")
    return reason is None


def _is_fast(feat_cache: Any) -> bool:
    return _reason_against_caches(feat_cache) is None


def _reason_against_caches(feat_cache: Any) -> str | None:
    """Why layers that are handed these frame caches take stock's way; None where they need not."""
    import torch

    if torch.compiler.is_compiling():
        return "it is being compiled"
    from wan_patches.ops.vae import FrameCaches

    if type(feat_cache) is not FrameCaches:
        return "the frame caches are stock's, or somebody's own"
    return "the pass began as stock's" if feat_cache.declined else _reason_against_now()


def _begins_fast(feat_cache: Any, coder: Any, x: Any, reason_against_input: Callable[[Any], str | None]) -> bool:
    """Whether a chunk `x` goes the short way; if not, what follows it in the same pass does not either."""
    import torch

    reason = _reason_against_caches(feat_cache)
    if reason is None:
        reason = reason_against_input(x) or _reason_against(coder)
        if reason is not None:
            feat_cache.declined = True
            _tell("A pass over a video", reason)
    elif not torch.compiler.is_compiling():
        reason = _reason_against(coder) or reason  # why the caches are stock's
    return _noted(type(coder).__name__, reason)


def _reason_against_video(x: Any) -> str | None:
    import torch

    return None if type(x) is torch.Tensor else f"it is a {type(x).__name__}"


def _reason_against_latents(z: Any) -> str | None:
    from wan_patches.ops.vae import is_channels_last

    if (reason := _reason_against_video(z)) is not None:
        return reason
    # stock goes on in that memory format to the first upsampling in time, and in the usual one after it
    return "its channels lie next to each other" if is_channels_last(z) else None


def _reason_against_decode(vae: Any, z: Any) -> str | None:
    """Why this decode is stock's from the beginning; None where it need not be."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    if vae.decoder is None:
        return "there is no decoder"
    if not has_librarys(vae, "clear_cache"):
        return "somebody looks at the beginnings of passes"
    if not is_librarys(wan.unpatchify):
        return "`unpatchify` is not the library's own"
    return _reason_against_latents(z) or _peculiarity(vae.post_quant_conv) or _reason_against(vae.decoder)


def _reason_against_now() -> str | None:
    """Why nothing can take the short way at the moment, whatever it is; None where it can."""
    import torch

    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if has_global_hooks():
        return "there are global module hooks"
    return "a compiler, a mode or a transform looks on" if is_watched() else None


def _reason_against(coder: Any) -> str | None:
    """Why this encoder or decoder takes stock's way now; None where it need not."""
    reason = _reason_against_now()
    if reason is not None:
        return reason
    for owner, name in _passed_over():
        function = getattr(owner, name)
        if not (is_librarys(function) if isinstance(owner, type) else are_torchs(function)):
            return f"{owner.__name__}.{name} is not the library's own"
    dtypes: set[Any] = set()
    for module in coder.modules():
        reason = _peculiarity(module)
        if reason is not None:
            return reason
        dtypes.update(parameter.dtype for parameter in filter(_is_given, module._parameters.values()))
    return "its weights are of several dtypes" if len(dtypes) > 1 else None


def _peculiarity(module: Any) -> str | None:
    """What makes a module of an encoder or decoder other than diffusers builds it."""
    import torch

    name = type(module).__name__
    if type(module) not in _kinds():
        return f"it has a {name} in it"
    if own_methods(module) or is_hooked(module):
        return f"a {name} has hooks or methods of its own"
    if module._compiled_call_impl is not None:
        return f"a {name} is compiled"
    if isinstance(module, torch.nn.Dropout) and module.training and module.p:
        return "dropout is on"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"a {name} pads otherwise than with zeros"
    for parameter in filter(_is_given, module._parameters.values()):
        if type(parameter) is not torch.nn.Parameter:
            return f"the weights of a {name} are not plain tensors"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # stock upsamples others in fp32
            return f"the weights of a {name} are {parameter.dtype}"
        if parameter.dim() > 3 and (parameter.stride(-1) != 1 or not parameter.is_contiguous()):
            return f"the weights of a {name} lie in another order"
    return None


def _is_given(parameter: Any) -> bool:
    return parameter is not None


@functools.lru_cache(maxsize=1)
def _passed_over() -> tuple[tuple[Any, str], ...]:
    """What stock calls and the short way does not, or with other tensors: whoever replaces it means stock's way."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    return (
        *((cls, "forward") for cls in _kinds() if "forward" in vars(cls)),
        *((cls, "_conv_forward") for cls in (nn.Conv2d, nn.Conv3d)),
        *((cls, "forward") for cls in (nn.Conv3d, nn.Upsample)),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        *((F, name) for name in ("conv2d", "conv3d", "dropout", "interpolate", "normalize", "pad", "silu")),
        *((torch, name) for name in ("cat", "clamp", "stack")),
    )


@functools.lru_cache(maxsize=1)
def _kinds() -> frozenset[type]:
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan
    from torch import nn

    own = (
        *("WanDecoder3d", "WanEncoder3d", "WanMidBlock", "WanUpBlock", "WanResidualUpBlock", "WanResidualDownBlock"),
        *("WanResidualBlock", "WanAttentionBlock", "WanResample", "WanUpsample", "WanCausalConv3d", "WanRMS_norm"),
        *("AvgDown3D", "DupUp3D"),
    )
    plain = (nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.SiLU, nn.ZeroPad2d)
    return frozenset((*(getattr(wan, name) for name in own), *plain))


@functools.lru_cache(maxsize=64)
def _tell(name: str, reason: str) -> None:
    logger.info("%s runs stock code: %s", name, reason)
