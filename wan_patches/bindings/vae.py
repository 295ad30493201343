"""Passes of an autoencoder over a video or an image, with a fast path for the work between its convolutions.

The autoencoders are Wan's and Qwen-Image's, whose layers are the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from wan_patches.bindings.forwards import has_global_hooks, is_hooked
from wan_patches.bindings.stock_functions import (
    are_torch_functions,
    has_library_methods,
    is_library_function,
    is_watched,
)
from wan_patches.ops import triton as kernels
from wan_patches.ops.convolution import Convolution
from wan_patches.ops.norm_silu import ChannelNorm, Memory, norm_silu
from wan_patches.ops.normed_convolution import normed_convolution
from wan_patches.ops.residual_convolution import residual_convolution
from wan_patches.ops.vae import HISTORY, FrameCaches, in_steps, interleave, is_channels_last, upsample, upsampled_bands
from wan_patches.ops.vae_division import (
    ROWS,
    STEP,
    convolution,
    convolution_of_first,
    convolves_divided,
    convolves_first,
    resizes_divided,
)
from wan_patches.patching import tally
from wan_patches.patching.fingerprints import AUTOENCODER, PREFIXES, TEXTS
from wan_patches.patching.objects import own_methods
from wan_patches.patching.rewrite import fingerprint

logger = logging.getLogger("wan_patches")

_SHORT = "shared windows, no clones"


# A pass over a video


def clear_cache(stock: Callable[..., None], vae: Any) -> None:
    """Begins a pass: installs `FrameCaches` in the encoder and the decoder if they can use them, else stock's lists."""
    stock(vae)
    if torch.compiler.is_compiling():
        return
    for coder, caches in ((vae.decoder, "_feat_map"), (vae.encoder, "_enc_feat_map")):
        reason = _reason_against(coder) if coder is not None else "there is none"
        if reason is None:
            setattr(vae, caches, FrameCaches(len(getattr(vae, caches))))
        else:
            _log_fallback(type(vae).__name__, reason)


def decode(stock: Callable[..., Any], vae: Any, z: torch.Tensor, return_dict: bool = True) -> Any:
    """Runs stock's untiled decode, but writes each chunk directly to its place in the video.

    z: `(batch, channels, latent frames, height, width)`; the video is `(batch, 3, frames, height, width)` in [-1, 1].
    """
    if torch.compiler.is_compiling() or vae.use_tiling:
        return stock(vae, z, return_dict)
    if (reason := _reason_against_decode(vae, z)) is not None:
        tally.count("decode", "", reason)
        return stock(vae, z, return_dict)
    tally.count("decode", "chunks written where they belong")
    frames = z.shape[2]
    video: Any = None
    first: Any = None
    end = 0
    with contextlib.closing(chunks(vae, z)) as decoded:
        for chunk in decoded:
            if first is None:
                first = chunk.clamp_(min=-1.0, max=1.0)
                continue
            if video is None:  # the second chunk has the frame count of all later ones
                end = first.shape[2]
                length = end + (frames - 1) * chunk.shape[2]
                video = chunk.new_empty((*chunk.shape[:2], length, *chunk.shape[3:]))
                video[:, :, :end] = first
            start, end = end, end + chunk.shape[2]
            torch.clamp(chunk, min=-1.0, max=1.0, out=video[:, :, start:end])
    video = first if video is None else video
    return DecoderOutput(sample=video) if return_dict else (video,)


def chunks(vae: Any, z: torch.Tensor) -> Generator[torch.Tensor, None, None]:
    """Yields what stock's untiled decode joins and clamps: the frames of each latent frame of `z` in turn.

    Callers must close the generator.
    """
    vae.clear_cache()
    try:
        latents = vae.post_quant_conv(z)
        caches = vae._feat_map  # this pass's caches: another pass may begin between two chunks
        tells_first = _origin(vae) == AUTOENCODER
        for i in range(latents.shape[2]):
            vae._conv_idx = index = [0]
            if i == latents.shape[2] - 1:
                _end(caches)
            is_first = {"first_chunk": True} if i == 0 and tells_first else {}
            chunk = vae.decoder(latents[:, :, i : i + 1], feat_cache=caches, feat_idx=index, **is_first)
            if (patch_size := _patch_size(vae)) is not None:
                chunk = sys.modules[_origin(vae)].unpatchify(chunk, patch_size=patch_size)
            yield chunk
            del chunk  # frees it before the next chunk is decoded
    finally:
        vae.clear_cache()  # also if a chunk ran out of device memory


def begin_chunk(vae: Any, chunk: int, chunks: int) -> list[int]:
    """Returns the index of the encoder's first convolution, as stock counts, at the beginning of one of its chunks."""
    if chunk == chunks - 1 and not torch.compiler.is_compiling() and has_library_methods(vae, "clear_cache"):
        _end(vae._enc_feat_map)
    return [0]


def _end(caches: Any) -> None:
    """Says that no frames follow those of the next chunk: the pass ends by clearing its caches."""
    if type(caches) is FrameCaches:
        caches.ends = True


def decode_chunk(
    stock: Callable[..., Any], decoder: Any, x: torch.Tensor, feat_cache: Any, feat_idx: list[int], *first_chunk: bool
) -> torch.Tensor:
    """Decodes one latent frame. The layers after the last temporal upsampling process a few frames at a time.

    first_chunk: whether it is a video's first, which only Wan's autoencoder is told.
    """
    if not _begins_fast(feat_cache, decoder, x, _reason_against_latents):
        return stock(decoder, x, feat_cache, feat_idx, *first_chunk)
    blocks = list(decoder.up_blocks)
    temporal = [i for i, block in enumerate(blocks) if _changes_frames(block)]
    split = temporal[-1] + 1 if temporal else 0

    layers = [layer for block in blocks[split:] for layer in _layers(block)]

    def tail(x: torch.Tensor, caches: FrameCaches, index: list[int]) -> torch.Tensor:
        for layer in layers:
            x = layer(x, feat_cache=caches, feat_idx=index)
        return _causal(decoder.conv_out, caches, index, x, decoder.norm_out)

    x = _causal(decoder.conv_in, feat_cache, feat_idx, x)
    x = decoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in blocks[:split]:
        x = block(x, feat_cache, feat_idx, *first_chunk)
    return _in_steps(tail, (*blocks[split:], decoder.conv_out), x, 2 ** len(temporal), feat_cache, feat_idx)


def encode_chunk(
    stock: Callable[..., Any], encoder: Any, x: torch.Tensor, feat_cache: Any, feat_idx: list[int]
) -> torch.Tensor:
    """Encodes one or four frames to a latent frame.

    The blocks before the first temporal downsampling process a few frames at a time.
    """
    if not _begins_fast(feat_cache, encoder, x, _reason_against_video):
        return stock(encoder, x, feat_cache=feat_cache, feat_idx=feat_idx)
    blocks = list(encoder.down_blocks)
    temporal = [i for i, block in enumerate(blocks) if _changes_frames(block)]
    split = temporal[0] if temporal else 0

    def run(blocks: list[Any], x: torch.Tensor, caches: FrameCaches, index: list[int]) -> torch.Tensor:
        for block in blocks:
            x = block(x) if _is_attention(block) else block(x, feat_cache=caches, feat_idx=index)
        return x

    x = _causal(encoder.conv_in, feat_cache, feat_idx, x)
    x = _in_steps(functools.partial(run, blocks[:split]), blocks[:split], x, 2 ** len(temporal), feat_cache, feat_idx)
    x = run(blocks[split:], x, feat_cache, feat_idx)
    x = encoder.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return _causal(encoder.conv_out, feat_cache, feat_idx, x, encoder.norm_out)


def residual_block(
    stock: Callable[..., Any], block: Any, x: torch.Tensor, feat_cache: Any, feat_idx: list[int]
) -> torch.Tensor:
    """Applies norm, SiLU and convolution twice, and adds the shortcut in place."""
    if not _noted("residual block", _reason_against_caches(feat_cache)):
        return stock(block, x, feat_cache, feat_idx)
    shortcut = x if block.in_dim == block.out_dim else convolution(block.conv_shortcut)(x)
    lengths: list[torch.Tensor] = []
    y = _causal(block.conv1, feat_cache, feat_idx, x, norm=block.norm1, normed_next=(block.norm2, lengths))
    length = lengths[0] if lengths else None
    return _causal(block.conv2, feat_cache, feat_idx, y, block.norm2, length, add=shortcut, overwrite=True)


def resample(
    stock: Callable[..., Any], module: Any, x: torch.Tensor, feat_cache: Any, feat_idx: list[int]
) -> torch.Tensor:
    """Resamples by two in height and width, and in time if the mode says so."""
    reason = "there is nothing to resample" if module.mode == "none" else _reason_against_caches(feat_cache)
    if not _noted("resample", reason):
        return stock(module, x, feat_cache, feat_idx)
    frames = x.transpose(1, 2)
    up = module.mode.startswith("up")
    if module.mode == "upsample3d":
        frames = _upsample_time(module.time_conv, x, feat_cache, feat_idx)
    conv, images = module.resample[1], frames.flatten(0, -4)
    divided = feat_cache.divided
    if x.is_cpu and not divided and images.shape[0] > 1:
        divided = resizes_divided(conv, tuple(images.shape), x.dtype, is_channels_last(images), up)
    if divided:
        y = _resize_divided(conv, images, up, feat_cache)
    else:
        y = conv((_upsample if up else _pad)(images, feat_cache))
    y = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return _downsample_time(module.time_conv, y, feat_cache, feat_idx) if module.mode == "downsample3d" else y


def unchanged(x: torch.Tensor, feat_cache: Any) -> torch.Tensor:
    """Returns `x`, which stock clones although nothing modifies it."""
    return x if _is_fast(feat_cache) else x.clone()


# Layers


def _causal(
    conv: Any,
    caches: FrameCaches,
    index: list[int],
    x: torch.Tensor,
    norm: Any = None,
    length: torch.Tensor | None = None,
    normed_next: tuple[Any, list[torch.Tensor]] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Applies a causal convolution of three taps in time, preceded by a norm and SiLU if given.

    Args:
        length: the lengths of `x` over its channels, if they are known.
        normed_next: a norm of the result, and a list that gets the lengths of the result if a kernel can use them.
    """
    _, left, _, above, _, _ = conv._padding
    activation = None if norm is None else functools.partial(_normed, norm, length)
    index[0] += 1
    position = index[0] - 1
    convolve, history = convolution(conv), HISTORY
    if x.is_cpu and x.shape[2] == 1 and caches[position] is None and _convolves_first(conv, x):
        convolve, history = convolution_of_first(conv), 0
    elif not x.is_cpu and (shortcut := options.pop("add", None)) is not None:
        convolve = functools.partial(_convolved_and_added, conv, shortcut)
    elif normed_next is not None and kernels.is_usable(x.device):
        convolve = functools.partial(_convolved_and_measured, conv, *normed_next)
    padding = above, left
    return caches.convolve(position, x, convolve, padding, history=history, activation=activation, **options)


def _convolved_and_added(conv: Any, shortcut: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Applies a convolution to all rows of `x`, already padded, and adds a shortcut."""
    return residual_convolution(x, Convolution.of(conv), shortcut)


def _convolved_and_measured(conv: Any, norm: Any, lengths: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Applies a convolution to all rows of `x`, already padded, and appends the lengths of the result."""
    y, length = normed_convolution(x, Convolution.of(conv), _normalizes_in_fp32(norm.__class__))
    lengths.append(length)
    return y


def _convolves_first(conv: Any, x: torch.Tensor) -> bool:
    """Whether a first frame can do without the zeros before it, which are two thirds of the work."""
    batch, channels, _, height, width = x.shape
    if channels != conv.in_channels or x.dtype != conv.weight.dtype:
        return False  # stock's convolution raises
    found = convolves_first(conv, (batch, height, width), x.dtype, is_channels_last(x))
    tally.note("first frame's convolution", "its last tap in time" if found else "all taps: others round differently")
    return found


def _normed(
    norm: Any, length: torch.Tensor | None, x: torch.Tensor, place: torch.Tensor, last: torch.Tensor | None
) -> torch.Tensor:
    """Applies an RMS norm and SiLU: an `Activation` for each norm and the lengths of `x`, if they are known."""
    if x.is_cpu:
        return F.silu(norm(x), inplace=True)
    return norm_silu(x, channel_norm(norm), Memory(place, last), length)[0]


def channel_norm(norm: Any) -> ChannelNorm:
    """Returns an autoencoder's RMS norm as `norm_silu` takes it."""
    bias = norm.bias if isinstance(norm.bias, torch.Tensor) else None
    plain = functools.partial(_plain_norm, norm)
    return ChannelNorm(plain, norm.scale, norm.gamma, bias, _normalizes_in_fp32(norm.__class__))


def _plain_norm(norm: Any, x: torch.Tensor, gamma: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `norm(x)`, with other weights if the gate tries some."""
    if gamma is not norm.gamma:
        norm = copy.copy(norm)  # another thread may be using the original
        weights: dict[str, Any] = {"gamma": gamma, "bias": bias}
        norm._parameters = {name: nn.Parameter(weights[name], False) for name in norm._parameters}
    return norm(x)


@functools.lru_cache(maxsize=len(PREFIXES))
def _normalizes_in_fp32(norm: type) -> bool:
    """Whether the installed class of RMS norms computes norms and quotients of half dtypes in fp32."""
    forward = vars(norm)["forward"]
    return TEXTS[norm.__module__][f"{norm.__name__}.forward"].get(fingerprint(forward)) == "0.38"


def _upsample_time(conv: Any, x: torch.Tensor, caches: FrameCaches, index: list[int]) -> torch.Tensor:
    """Returns `(batch, frames, 2, channels, height, width)`; the first pass keeps the frame count and lacks the 2."""
    if caches[index[0]] is None:
        caches[index[0]] = "Rep"  # the marker that stock uses
        index[0] += 1
        return x.transpose(1, 2)
    return interleave(_causal(conv, caches, index, x))


def _upsample(frames: torch.Tensor, caches: FrameCaches) -> torch.Tensor:
    *leading, height, width = frames.shape
    return upsample(frames, caches.shared((*leading, 2 * height, 2 * width), frames, is_channels_last(frames)))


def _resize_divided(conv: Any, images: torch.Tensor, up: bool, caches: FrameCaches) -> torch.Tensor:
    """Resizes one image at a time, and in bands of rows when upsampling.

    `(images, channels, height, width)` becomes twice or half the size.
    """
    if not up:
        return torch.cat([conv(_pad(image, caches)) for image in images.split(1)])
    count, _, height, width = images.shape
    y = images.new_empty((count, conv.out_channels, 2 * height, 2 * width))
    convolve = convolution(conv, (0, conv.padding[1]))  # each band contains its neighbouring rows
    for image, out in zip(images.split(1), y.split(1)):
        for rows, band in upsampled_bands(image, ROWS, caches):
            out[..., rows, :] = convolve(band)
    return y


def _pad(frames: torch.Tensor, caches: FrameCaches) -> torch.Tensor:
    """Pads with a row of zeros below and a column of zeros on the right."""
    *leading, height, width = frames.shape
    padded = caches.shared((*leading, height + 1, width + 1), frames, is_channels_last(frames))
    padded[..., height, :] = 0
    padded[..., width] = 0
    padded[..., :height, :width] = frames
    return padded


def _downsample_time(conv: Any, x: torch.Tensor, caches: FrameCaches, index: list[int]) -> torch.Tensor:
    """Convolves frames and the last frame of the previous pass with a stride of two; the first pass is unchanged."""
    before = caches[index[0]]
    caches[index[0]] = None if caches.forgets else (x if before is None else x[:, :, -1:]).clone()
    index[0] += 1
    return x if before is None else convolution(conv)(torch.cat([before[:, :, -1:], x], dim=2))


def _layers(block: Any) -> list[Any]:
    """Returns the layers of an up block in order. Called one by one, they let the block's input be freed early."""
    if hasattr(block, "avg_shortcut"):
        return [block]
    return [*block.resnets, *(block.upsamplers or ())]


def _changes_frames(block: Any) -> bool:
    return any(hasattr(module, "time_conv") for module in block.modules())


def _is_attention(block: Any) -> bool:
    return hasattr(block, "to_qkv")


# A few frames and rows at a time


def _in_steps(
    run: Callable[..., torch.Tensor],
    modules: Iterable[Any],
    x: torch.Tensor,
    frames: int,
    caches: FrameCaches,
    index: list[int],
) -> torch.Tensor:
    """Runs `run(x, caches, index)` of modules that keep the frame count, in steps if that gives the same bits.

    frames: the frame count of `x` in every pass except the first, which has one.
    """
    first, is_first_pass = index[0], caches[index[0]] is None
    if is_first_pass and caches.ends:
        return run(x, caches, index)  # an image: there is nothing to divide
    # tested in the first pass already: most caches are still empty, so there is memory for the trials
    divided = _can_be_divided(modules, x, frames if is_first_pass else x.shape[2])
    if is_first_pass or not divided:
        return run(x, caches, index)

    def rewind() -> None:
        index[0], caches.continues = first, True

    caches.divide()
    try:
        return in_steps(lambda x: run(x, caches, index), x, STEP, rewind)
    finally:
        caches.unite()


def _can_be_divided(modules: Iterable[Any], x: torch.Tensor, frames: int) -> bool:
    """Whether processing a few frames and rows of `x` at a time gives the bits of the whole.

    On a CPU the summation order of a convolution mostly does not depend on the number of frames and rows, as long as
    ATen dispatches both to the same library. Each convolution and shape is tested. Accelerator libraries choose an
    algorithm by shape, so nothing is divided there.
    """
    if not x.is_cpu or frames <= STEP or frames % STEP:
        return False
    batch, _, _, height, width = x.shape
    formats = {False, is_channels_last(x)}  # some windows are only partly in channels-last memory
    for module in (part for block in modules for part in block.modules()):
        if _is_attention(module):
            return False
        if hasattr(module, "resample"):
            up, conv = module.mode.startswith("up"), module.resample[1]
            shape = (batch * frames, conv.in_channels, height, width)
            if not all(resizes_divided(conv, shape, x.dtype, channels_last, up) for channels_last in formats):
                return False
            height, width = (2 * height, 2 * width) if up else (height // 2, width // 2)
        elif isinstance(module, nn.Conv3d):
            shape = (batch, frames, height, width)
            if not all(convolves_divided(module, shape, x.dtype, channels_last) for channels_last in formats):
                return False
    return True


# When the fast path applies


def _noted(op: str, reason: str | None) -> bool:
    """Counts a call, which takes the fast path if there is no reason against it; returns whether it does."""
    tally.note(op, "" if reason else _SHORT, reason or "")
    return reason is None


def _is_fast(feat_cache: Any) -> bool:
    return _reason_against_caches(feat_cache) is None


def _reason_against_caches(feat_cache: Any) -> str | None:
    """Why layers with these frame caches fall back to the stock implementation, or None."""
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if type(feat_cache) is not FrameCaches:
        return "the frame caches are stock's, or somebody's own"
    return "the pass began as stock's" if feat_cache.declined else _reason_against_now()


def _begins_fast(
    feat_cache: Any, coder: Any, x: torch.Tensor, reason_against_input: Callable[[torch.Tensor], str | None]
) -> bool:
    """Whether a chunk `x` takes the fast path; if not, neither does the rest of its pass."""
    reason = _reason_against_caches(feat_cache)
    if reason is None:
        reason = reason_against_input(x) or _reason_against(coder)
        if reason is not None:
            feat_cache.declined = True
            _log_fallback("A pass over a video", reason)
    elif not torch.compiler.is_compiling():
        reason = _reason_against(coder) or reason  # the reason why the caches are stock's
    return _noted(type(coder).__name__, reason)


def _reason_against_video(x: torch.Tensor) -> str | None:
    return None if type(x) is torch.Tensor else f"it is a {type(x).__name__}"


def _reason_against_latents(z: torch.Tensor) -> str | None:
    if (reason := _reason_against_video(z)) is not None:
        return reason
    # stock keeps that memory format until the first temporal upsampling, and uses the default one after it
    return "its channels lie next to each other" if is_channels_last(z) else None


def _reason_against_decode(vae: Any, z: torch.Tensor) -> str | None:
    """Why this decode falls back to the stock implementation from the beginning, or None."""
    if vae.decoder is None:
        return "there is no decoder"
    if not has_library_methods(vae, "clear_cache"):
        return "somebody looks at the beginnings of passes"
    if _patch_size(vae) is not None and not is_library_function(sys.modules[_origin(vae)].unpatchify):
        return "`unpatchify` is not the library's own"
    conv = vae.post_quant_conv
    return _reason_against_latents(z) or _peculiarity(conv, _stock_types(_origin(vae))) or _reason_against(vae.decoder)


def _reason_against_now() -> str | None:
    """Why the fast path is unavailable at the moment, for any module; None if it is available."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if has_global_hooks():
        return "there are global module hooks"
    return "a compiler, a mode or a transform looks on" if is_watched() else None


def _reason_against(coder: Any) -> str | None:
    """Why this encoder or decoder falls back to the stock implementation now, or None."""
    reason = _reason_against_now()
    if reason is not None:
        return reason
    origin = _origin(coder)
    for owner, name in _bypassed(origin):
        function = getattr(owner, name)
        if not (is_library_function(function) if isinstance(owner, type) else are_torch_functions(function)):
            return f"{owner.__name__}.{name} is not the library's own"
    dtypes: set[Any] = set()
    for module in coder.modules():
        reason = _peculiarity(module, _stock_types(origin))
        if reason is not None:
            return reason
        dtypes.update(parameter.dtype for parameter in filter(_is_given, module._parameters.values()))
    return "its weights are of several dtypes" if len(dtypes) > 1 else None


def _peculiarity(module: nn.Module, stock_types: frozenset[type]) -> str | None:
    """Returns how a module of an encoder or decoder differs from what diffusers builds, or None."""
    name = type(module).__name__
    if type(module) not in stock_types:
        return f"it has a {name} in it"
    if own_methods(module) or is_hooked(module):
        return f"a {name} has hooks or methods of its own"
    if module._compiled_call_impl is not None:
        return f"a {name} is compiled"
    if isinstance(module, nn.Dropout) and module.training and module.p:
        return "dropout is on"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"a {name} pads otherwise than with zeros"
    for parameter in filter(_is_given, module._parameters.values()):
        if type(parameter) is not torch.nn.Parameter:
            return f"the weights of a {name} are not plain tensors"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # stock upsamples these in fp32
            return f"the weights of a {name} are {parameter.dtype}"
        if parameter.dim() > 3 and (parameter.stride(-1) != 1 or not parameter.is_contiguous()):
            return f"the weights of a {name} lie in another order"
    return None


def _is_given(parameter: nn.Parameter | None) -> bool:
    return parameter is not None


def _origin(model: Any) -> str:
    """Returns the name of the module that defines the class of an autoencoder or of one of its halves, or its base."""
    return next((cls.__module__ for cls in type(model).__mro__ if cls.__module__ in PREFIXES), "")


def _patch_size(vae: Any) -> Any:
    return vae.config.get("patch_size")


@functools.lru_cache(maxsize=1 + len(PREFIXES))
def _bypassed(origin: str) -> tuple[tuple[Any, str], ...]:
    """Returns the functions that the fast path skips or calls with other tensors.

    If one of them is replaced, stock code has to run.
    """
    return (
        *((cls, "forward") for cls in _stock_types(origin) if "forward" in vars(cls)),
        *((cls, "_conv_forward") for cls in (nn.Conv2d, nn.Conv3d)),
        *((cls, "forward") for cls in (nn.Conv3d, nn.Upsample)),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        *((F, name) for name in ("conv2d", "conv3d", "dropout", "interpolate", "normalize", "pad", "silu")),
        *((torch, name) for name in ("cat", "clamp", "stack")),
    )


@functools.lru_cache(maxsize=1 + len(PREFIXES))
def _stock_types(origin: str) -> frozenset[type]:
    """Returns the classes of modules in an autoencoder as diffusers builds it; none of an unknown one."""
    if origin not in PREFIXES:
        return frozenset()
    own = (
        *("Decoder3d", "Encoder3d", "MidBlock", "UpBlock", "ResidualUpBlock", "ResidualDownBlock"),
        *("ResidualBlock", "AttentionBlock", "Resample", "Upsample", "CausalConv3d", "RMS_norm"),
    )
    names = (*(PREFIXES[origin] + name for name in own), "AvgDown3D", "DupUp3D")
    plain = (nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.SiLU, nn.ZeroPad2d)
    library = sys.modules[origin]
    return frozenset((*(getattr(library, name) for name in names if hasattr(library, name)), *plain))


@functools.lru_cache(maxsize=64)
def _log_fallback(name: str, reason: str) -> None:
    logger.info("%s runs stock code: %s", name, reason)
