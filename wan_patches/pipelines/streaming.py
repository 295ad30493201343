"""Streams the frames of a video while the VAE is still decoding, with the bits of the whole video.

    def on_frames(chunk: Chunk) -> None:
        for frame in chunk.frames[0]:
            write(frame)

    wan_patches.stream_frames(pipe, on_frames, prompt="a fox", output_type="pil")

Wan's VAE decodes one latent frame at a time: the first into one frame, each later one into four. Stock joins the
decoded frames and passes the whole video to the video processor. Here the processor gets each chunk as soon as it is
decoded, and the pipeline gets a stand-in without pixels, which it passes to the processor instead of the video. The
texts of the few statements between the two calls prove that a pipeline does nothing else with the decoded video.

Streaming does not depend on the patches: it runs the decoder and the processor as they are, patched or stock.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from wan_patches.bindings.processors import is_stock
from wan_patches.bindings.stock_functions import (
    are_torch_functions,
    has_library_methods,
    is_library_function,
    is_library_function_throughout,
    is_watched,
)
from wan_patches.patches.processors import POSTPROCESS
from wan_patches.patching.codeswap import functions_behind, stock
from wan_patches.patching.fingerprints import AUTOENCODER, DECODED, JOINED, JOINED_NAMES, STRAIGHT, is_known
from wan_patches.patching.objects import exchange_class, own_methods
from wan_patches.patching.rewrite import Unknown, bodies, fingerprint, parse
from wan_patches.pipelines import stages

__all__ = ["Chunk", "stream_frames"]

logger = logging.getLogger("wan_patches")

_OUTPUT_TYPES = ("pil", "np", "pt")
#: Modules whose functions can be on the stack between a pipeline and `_decode`.
_ON_THE_WAY = frozenset({AUTOENCODER, "diffusers.utils.accelerate_utils", "wan_patches.pipelines.stages"})
_STREAMED = "_wan_patches_streamed"


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames of a video.

    frames: the `frames` of a pipeline result for a video of only these frames. For `output_type="pil"`: a list of
        images for each video of the batch; for "np": a float32 array `(batch, frames, height, width, channels)`; for
        "pt": a tensor `(batch, frames, channels, height, width)`.
    start: index of the first of these frames in the video, from 0.
    reason: why the video was not streamed but delivered after decoding; None for streamed frames.
    """

    frames: Any
    start: int
    reason: str | None = None


def stream_frames(pipe: Any, on_frames: Callable[[Chunk], object], /, *arguments: Any, **keywords: Any) -> Any:
    """Calls a pipeline and delivers the frames of its video while the VAE is still decoding.

    The concatenated chunks have the bits of the video that a plain call returns. The whole video is never in memory
    unless `on_frames` keeps it; the `frames` of the result are None. All frames are delivered at the end, in one chunk
    with the reason, if the pipeline, its VAE or its video processor is not a known one, or if other code accesses the
    decoded video. The reason is also logged, once. With VAE tiling a video is decoded and delivered as a whole; in
    Helios, chunk by chunk.

    Pipeline, VAE and processor are restored after the call, also after an exception. Other threads may call other
    pipelines at the same time.

    Args:
        pipe: a diffusers pipeline. Frames are streamed from pipelines that decode with `AutoencoderKLWan` and do not
            process the decoded video further: Wan T2V, I2V, V2V and VACE, SkyReels-V2 (except video to video), Helios,
            AnyFlow.
        on_frames: called in this thread with each `Chunk`, in order. To stop the pipeline, raise an exception here or
            in a step callback; it propagates to the caller.
        arguments, keywords: the arguments of the pipeline.

    Returns:
        The pipeline's result with `frames` (or the first item of a tuple) set to None.

    Raises:
        ValueError: `output_type` is "latent", which produces no frames.
        Exception: any exception of the pipeline or of `on_frames`.
    """
    output_type = _argument("output_type", pipe, arguments, keywords)
    if output_type == "latent":
        raise ValueError('output_type="latent" produces no frames: use "pil", "np" or "pt"')
    stream = _Stream(on_frames, output_type)
    with stream.tapping(pipe):
        return stream.finish(pipe, pipe(*arguments, **keywords))


#: The stream of the pipeline call in progress in this thread or task.
_stream: ContextVar[_Stream | None] = ContextVar("wan_patches.stream", default=None)
_lock = threading.Lock()


class _Stream:
    """The frames of one pipeline call, on their way from the VAE to the callback."""

    def __init__(self, on_frames: Callable[[Chunk], object], output_type: Any) -> None:
        self._on_frames, self._output_type = on_frames, output_type
        self._reason: str | None = None
        self._reason_against_pieces: str | None = None
        self._group = 1  # size of the groups that pipelines drop if incomplete
        self._postprocess: Callable[..., Any] | None = None
        self._handed_over = 0
        self._held: torch.Tensor | None = None  # frames of an incomplete group, which may be dropped
        self._begun = False

    @contextlib.contextmanager
    def tapping(self, pipe: Any) -> Iterator[None]:
        """Sends the frames decoded in the block, in this thread, through this stream, if pipeline and VAE are known."""
        with contextlib.ExitStack() as stack:
            stack.callback(_stream.reset, _stream.set(self))
            with _lock:  # two threads may use the same VAE
                self._reason = self._reason_against(pipe)
                if self._reason is None:
                    self._tap(pipe, stack)
            yield

    def finish(self, pipe: Any, result: Any) -> Any:
        """Returns the result of the call without its frames, after delivering any remaining ones."""
        if self._begun:
            return result
        frames, rest = _without_frames(pipe, result)
        if self._reason is None:
            self._reason = "the pipeline decoded nothing in this thread"
        if frames is None:
            _warn_once(
                f"there are no frames in a {type(result).__name__}, and {self._reason}", "no frames were streamed"
            )
            return result
        self._hand_over(frames)
        return rest

    # Before the call

    def _reason_against(self, pipe: Any) -> str | None:
        way = _use_of_decoded_video(type(pipe))
        vae: Any = getattr(pipe, "vae", None)
        processor: Any = getattr(pipe, "video_processor", None)
        if way is None:
            return f"a {type(pipe).__name__} may process the decoded video further"
        if self._output_type not in _OUTPUT_TYPES:
            return "the output type is unknown"
        if way == JOINED:
            self._group = pipe.vae_scale_factor_temporal
        if not _has_known_decode(vae):
            return f"the VAE, a {type(vae).__name__}, is not a known AutoencoderKLWan, or other code wraps it"
        if vae.use_slicing:
            return "the VAE decodes the videos of a batch one by one (enable_slicing)"
        if not is_stock(processor, (*POSTPROCESS, "postprocess_video")):
            return "the video processor is unknown or was changed"
        if hasattr(vae, _STREAMED) or hasattr(processor, _STREAMED):
            return "another stream is using this VAE"
        return None

    def _tap(self, pipe: Any, stack: contextlib.ExitStack) -> None:
        vae, processor = pipe.vae, pipe.video_processor
        vae_class, processor_class, stream = type(vae), type(processor), self
        if not _decodes_by_latent_frame(vae):
            self._reason_against_pieces = "the VAE's decoding loop is unknown or was changed"
        self._postprocess = functools.partial(processor_class.postprocess_video, processor)

        def decode(vae: Any, z: Any, *args: Any, **kwargs: Any) -> Any:
            if _stream.get() is not stream or not _is_called_by(pipe):
                return vae_class._decode(vae, z, *args, **kwargs)
            return stream._decode(functools.partial(vae_class._decode, vae), vae, z, *args, **kwargs)

        def postprocess_video(processor: Any, video: Any, *args: Any, **kwargs: Any) -> Any:
            if _stream.get() is not stream or not stream._begun or video.shape[-2:] != (0, 0):
                return processor_class.postprocess_video(processor, video, *args, **kwargs)
            return stream._end(video)

        stack.callback(exchange_class(vae, {"_decode": decode, _STREAMED: True}))
        stack.callback(exchange_class(processor, {"postprocess_video": postprocess_video, _STREAMED: True}))

    # During the call

    def _decode(self, whole: Callable[..., Any], vae: Any, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Replaces the VAE's `_decode`: delivers the frames and returns a video without pixels."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        from wan_patches.bindings.vae import chunks

        reason = self._reason_against_pieces or _reason_against_streaming(vae, z)
        if reason is None:
            stand_ins = []
            with contextlib.closing(chunks(vae, z)) as decoded:
                for chunk in decoded:
                    stand_ins.append(self._add(torch.clamp(chunk, min=-1.0, max=1.0)))
                    del chunk  # free it before the next one is decoded
            sample = torch.cat(stand_ins, dim=2)
        else:
            if self._group == 1:  # otherwise this is only a part of the video
                self._reason = reason
            sample = self._add(whole(z, return_dict=False)[0])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _add(self, video: torch.Tensor) -> torch.Tensor:
        """Delivers the next frames, `(batch, channels, frames, height, width)` in [-1, 1]; returns their stand-in."""
        assert self._postprocess is not None
        self._begun = True
        stand_in = video.new_empty((*video.shape[:3], 0, 0))
        if self._held is not None:
            video, self._held = torch.cat([self._held, video], dim=2), None
        total = self._handed_over + video.shape[2]
        count = (total - 1) // self._group * self._group + 1 - self._handed_over
        if count < video.shape[2]:
            self._held = video[:, :, count:].clone()
        if count:
            self._hand_over(self._postprocess(video[:, :, :count], output_type=self._output_type), count)
        return stand_in

    def _end(self, video: torch.Tensor) -> None:
        """Replaces `postprocess_video` for the stand-in of the whole video."""
        self._held = None
        if video.shape[2:] != (self._handed_over, 0, 0):
            raise RuntimeError(
                f"{self._handed_over} frames were delivered, but the pipeline expects {tuple(video.shape)}: please "
                "report this, and call the pipeline without streaming"
            )

    def _hand_over(self, frames: Any, count: int = 0) -> None:
        if self._reason is not None:
            _warn_once(self._reason)
        chunk = Chunk(frames, self._handed_over, self._reason)
        del frames
        self._handed_over += count
        token = _stream.set(None)  # the callback may decode videos of its own
        try:
            self._on_frames(chunk)
        finally:
            _stream.reset(token)


def _is_called_by(pipe: Any) -> bool:
    """Whether the pipeline decodes its own video, and not other code inside its call, such as a preview callback."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in _ON_THE_WAY and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe


def _argument(name: str, pipe: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Returns the call's value for a parameter of the pipeline, or the parameter's default; None if there is none."""
    try:
        call = inspect.signature(type(pipe).__call__).bind(pipe, *arguments, **keywords)
    except (TypeError, ValueError):  # invalid arguments; the call itself raises a better error
        return None
    call.apply_defaults()
    return call.arguments.get(name)


def _without_frames(pipe: Any, result: Any) -> tuple[Any, Any]:
    """Returns the frames of a result, or None if it has none, and the result without them."""
    from diffusers import DiffusionPipeline

    if dataclasses.is_dataclass(result) and not isinstance(result, type) and hasattr(result, "frames"):
        return result.frames, dataclasses.replace(result, frames=None)
    if type(result) is tuple and result and isinstance(pipe, DiffusionPipeline):
        return result[0], (None, *result[1:])
    return None, result


@functools.lru_cache(maxsize=64)
def _warn_once(reason: str, what: str = "frames are delivered at the end") -> None:
    logger.warning("%s: %s", what, reason)


# Recognising pipelines and VAEs


def _use_of_decoded_video(pipeline: type) -> str | None:
    """Returns how pipelines of a class use decoded videos, one of the values of `DECODED`; None if unknown."""
    call: Any = pipeline.__call__
    while hasattr(call, "__wrapped__") and (is_library_function(call) or _is_ours(call)):
        call = call.__wrapped__
    return _use_in(stock(call)) if is_library_function(call) and not hasattr(call, "__wrapped__") else None


def _is_ours(call: Any) -> bool:
    """Whether this package has wrapped a pipeline's call, whose result the wrapper returns unchanged."""
    return type(call) is types.FunctionType and call.__globals__["__name__"].startswith("wan_patches.")


@functools.lru_cache(maxsize=64)
def _use_in(call: types.FunctionType) -> str | None:
    try:
        function = parse(call)
    except Unknown:
        return None
    if sum(map(_is_decode, ast.walk(function))) != 1:
        return None
    for body in bodies(function):
        for i, statement in enumerate(body):
            decodes = isinstance(statement, ast.Assign) and any(map(_is_decode, ast.walk(statement)))
            if decodes and DECODED.get(fingerprint(body[i : i + 2])) == STRAIGHT:
                return STRAIGHT
    joined = [part for part in _simple_parts(function) if not JOINED_NAMES.isdisjoint(_names(part))]
    return DECODED.get(fingerprint(joined))


def _simple_parts(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields the simple statements of a function, and the conditions and iterables of its compound statements."""
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.While)):
            yield node.test
        elif isinstance(node, ast.For):
            yield node.iter
        elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
            yield node


def _names(part: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}


def _is_decode(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "decode" and ast.unparse(node.value) == "self.vae"


def _has_known_decode(vae: Any) -> bool:
    """Whether `decode` returns the result of `_decode` to the pipeline unchanged, without other code reading it."""
    cls = type(vae)
    function = inspect.getattr_static(cls, "decode", None)
    if AUTOENCODER not in sys.modules or not is_library_function_throughout(function) or "_decode" in own_methods(vae):
        return False
    found: Any = vars(vae).get("decode")
    if stages.is_watching(found):
        found = found.__wrapped__
    is_own = found is None or found == types.MethodType(function, vae)
    behind = functions_behind(function, sys.modules[AUTOENCODER].__file__)
    return is_own and is_known(behind[-1], AUTOENCODER, "AutoencoderKLWan.decode")


def _decodes_by_latent_frame(vae: Any) -> bool:
    """Whether the VAE's methods decode one latent frame at a time, then join and clamp the results."""
    function = inspect.getattr_static(type(vae), "_decode", None)
    return has_library_methods(vae, "_decode", "clear_cache") and is_known(
        function, AUTOENCODER, "AutoencoderKLWan._decode"
    )


def _reason_against_streaming(vae: Any, z: torch.Tensor) -> str | None:
    """Returns why these latents have to be decoded as a whole, or None."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    scale = vae.spatial_compression_ratio
    tile = vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale
    if vae.use_tiling and (z.shape[-2] > tile[0] or z.shape[-1] > tile[1]):
        return "the VAE decodes the video in tiles (enable_tiling)"
    if not (is_library_function(wan.unpatchify) and are_torch_functions(torch.cat, torch.clamp)):
        return "a function that joins or clamps decoded frames was replaced"
    return "a mode, a transform or a compiler observes the operations" if is_watched() else None
