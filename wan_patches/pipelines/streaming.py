"""Frames of a video while the autoencoder goes on: chunk by chunk, with the bits that the whole video would have.

    def on_frames(chunk: Chunk) -> None:
        for frame in chunk.frames[0]:
            write(frame)

    wan_patches.stream_frames(pipe, on_frames, prompt="a fox", output_type="pil")

Wan's autoencoder decodes one latent frame after another: four frames each, the first time one. Stock joins them, and
hands the whole video to the processor that makes frames of it. Here the processor gets each chunk when it is there, and
the pipeline gets a stand-in without pixels, which comes to the processor in the place of the video. It is known of
pipelines that they do no more with it than that, by the text of the few statements between the two calls.

Patches may be enabled or not: whatever the decoder and the processor run, they run here.
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
#: Modules whose functions are called between a pipeline and `_decode`.
_ON_THE_WAY = frozenset({AUTOENCODER, "diffusers.utils.accelerate_utils", "wan_patches.pipelines.stages"})
_STREAMED = "_wan_patches_streamed"


@dataclass(frozen=True)
class Chunk:
    """Frames of a video, one after another.

    frames: what the pipeline's result would have as `frames` of a video of just these: for `output_type="pil"` a list
        of images for each video of the batch, for "np" a float32 array `(batch, frames, height, width, channels)`, for
        "pt" a tensor `(batch, frames, channels, height, width)`.
    start: the place of the first of them in the video, from 0.
    reason: why they come when the whole video has been decoded; None where they come as soon as they are.
    """

    frames: Any
    start: int
    reason: str | None = None


def stream_frames(pipe: Any, on_frames: Callable[[Chunk], object], /, *arguments: Any, **keywords: Any) -> Any:
    """Calls a pipeline, and hands the frames of its video over while the autoencoder goes on.

    The chunks, put together, have the bits of the video that the call would have given. The whole video is never in
    memory, unless `on_frames` keeps it: what was handed over is not in the result too, whose `frames` are None. Where
    the pipeline, its autoencoder or its processor is not as known, or something else than the pipeline looks at what is
    decoded, all frames come at the end, in one chunk that has the reason; the log has it once. With tiling a video is
    decoded, and comes, as a whole, in Helios chunk by chunk.

    Nothing of it is left afterwards, also after an exception. Other threads may call other pipelines meanwhile.

    Args:
        pipe: a diffusers pipeline; chunks come from those that decode with `AutoencoderKLWan` and do no more with the
            video: Wan T2V, I2V, V2V and VACE, SkyReels-V2 (but video to video), Helios, AnyFlow.
        on_frames: called in this thread with each `Chunk`, in order. What it raises leaves the pipeline, as does
            whatever a step's callback raises: that is the way to stop.
        arguments, keywords: what the pipeline takes.

    Returns:
        What the pipeline returns, its `frames` (or the first of a tuple) None.

    Raises:
        ValueError: `output_type` is "latent", of which there are no frames.
        Exception: what the pipeline or `on_frames` raises.
    """
    output_type = _argument("output_type", pipe, arguments, keywords)
    if output_type == "latent":
        raise ValueError('with output_type="latent" there are no frames: ask for "pil", "np" or "pt"')
    stream = _Stream(on_frames, output_type)
    with stream.tapping(pipe):
        return stream.finish(pipe, pipe(*arguments, **keywords))


#: The stream of the pipeline call that runs in this thread or task.
_stream: ContextVar[_Stream | None] = ContextVar("wan_patches.stream", default=None)
_lock = threading.Lock()


class _Stream:
    """The frames of one call of a pipeline, from the autoencoder to whoever gets them."""

    def __init__(self, on_frames: Callable[[Chunk], object], output_type: Any) -> None:
        self._on_frames, self._output_type = on_frames, output_type
        self._reason: str | None = None
        self._reason_against_pieces: str | None = None
        self._group = 1  # frames that pipelines leave out together, at the end
        self._postprocess: Callable[..., Any] | None = None
        self._handed_over = 0
        self._held: torch.Tensor | None = None  # frames that may be left out
        self._begun = False

    @contextlib.contextmanager
    def tapping(self, pipe: Any) -> Iterator[None]:
        """In the block, this thread's decoded frames go through this stream, where all is as known."""
        with contextlib.ExitStack() as stack:
            stack.callback(_stream.reset, _stream.set(self))
            with _lock:  # two threads may use the same autoencoder
                self._reason = self._reason_against(pipe)
                if self._reason is None:
                    self._tap(pipe, stack)
            yield

    def finish(self, pipe: Any, result: Any) -> Any:
        """The result of the call without its frames, all of which have been handed over now."""
        if self._begun:
            return result
        frames, rest = _taken(pipe, result)
        if self._reason is None:
            self._reason = "the pipeline decoded nothing in this thread"
        if frames is None:
            _tell(f"there are no frames in a {type(result).__name__}, and {self._reason}", "no frames were streamed")
            return result
        self._hand_over(frames)
        return rest

    # Before the call

    def _reason_against(self, pipe: Any) -> str | None:
        way = _way_of_decoded(type(pipe))
        vae: Any = getattr(pipe, "vae", None)
        processor: Any = getattr(pipe, "video_processor", None)
        if way is None:
            return f"a {type(pipe).__name__} may do more with a decoded video than make frames of it"
        if self._output_type not in _OUTPUT_TYPES:
            return "it is not known what frames are asked for"
        if way == JOINED:
            self._group = pipe.vae_scale_factor_temporal
        if not _decodes_as_known(vae):
            return f"the autoencoder, a {type(vae).__name__}, is not AutoencoderKLWan as known, or somebody looks at it"
        if vae.use_slicing:
            return "the autoencoder decodes the videos of a batch one by one (enable_slicing)"
        if not is_stock(processor, (*POSTPROCESS, "postprocess_video")):
            return "the video processor is not as known"
        if hasattr(vae, _STREAMED) or hasattr(processor, _STREAMED):
            return "another stream comes from this autoencoder at the moment"
        return None

    def _tap(self, pipe: Any, stack: contextlib.ExitStack) -> None:
        vae, processor = pipe.vae, pipe.video_processor
        vae_class, processor_class, stream = type(vae), type(processor), self
        if not _decodes_piecewise(vae):
            self._reason_against_pieces = "the autoencoder's way of decoding is not as known"
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

    # While it runs

    def _decode(self, whole: Callable[..., Any], vae: Any, z: torch.Tensor, return_dict: bool = True) -> Any:
        """In the place of the autoencoder's `_decode`: hands the frames over, and gives a video without pixels."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        from wan_patches.bindings.vae import chunks

        reason = self._reason_against_pieces or _reason_against_now(vae, z)
        if reason is None:
            stand_ins = []
            with contextlib.closing(chunks(vae, z)) as decoded:
                for chunk in decoded:
                    stand_ins.append(self._add(torch.clamp(chunk, min=-1.0, max=1.0)))
                    del chunk  # before the next is made
            sample = torch.cat(stand_ins, dim=2)
        else:
            if self._group == 1:  # else it is no more than a part of the video
                self._reason = reason
            sample = self._add(whole(z, return_dict=False)[0])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _add(self, video: torch.Tensor) -> torch.Tensor:
        """Hands over what follows, `(batch, channels, frames, height, width)` in [-1, 1]; the same without pixels."""
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
        """In the place of `postprocess_video`, for the stand-in of the whole video."""
        self._held = None
        if video.shape[2:] != (self._handed_over, 0, 0):
            raise RuntimeError(
                f"{self._handed_over} frames were handed over, and the pipeline wants {tuple(video.shape)}: please "
                "report this, and call the pipeline without streaming"
            )

    def _hand_over(self, frames: Any, count: int = 0) -> None:
        if self._reason is not None:
            _tell(self._reason)
        chunk = Chunk(frames, self._handed_over, self._reason)
        del frames
        self._handed_over += count
        token = _stream.set(None)  # what the callback decodes is its own
        try:
            self._on_frames(chunk)
        finally:
            _stream.reset(token)


def _is_called_by(pipe: Any) -> bool:
    """Whether the pipeline decodes its video, and not somebody within its call: a step's callback, for a preview."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in _ON_THE_WAY and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe


def _argument(name: str, pipe: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """What the call gives for a parameter of the pipeline's, or the parameter's default; None if there is none."""
    try:
        call = inspect.signature(type(pipe).__call__).bind(pipe, *arguments, **keywords)
    except (TypeError, ValueError):  # arguments that do not fit, about which the call will say more
        return None
    call.apply_defaults()
    return call.arguments.get(name)


def _taken(pipe: Any, result: Any) -> tuple[Any, Any]:
    """The frames of a result, None where there are none, and the result without them."""
    from diffusers import DiffusionPipeline

    if dataclasses.is_dataclass(result) and not isinstance(result, type) and hasattr(result, "frames"):
        return result.frames, dataclasses.replace(result, frames=None)
    if type(result) is tuple and result and isinstance(pipe, DiffusionPipeline):
        return result[0], (None, *result[1:])
    return None, result


@functools.lru_cache(maxsize=64)
def _tell(reason: str, what: str = "frames come at the end") -> None:
    logger.warning("%s: %s", what, reason)


# What is known


def _way_of_decoded(pipeline: type) -> str | None:
    """What pipelines of a class do with decoded videos, one of the values of `DECODED`; None: not known."""
    call: Any = pipeline.__call__
    while hasattr(call, "__wrapped__") and (is_library_function(call) or _is_ours(call)):
        call = call.__wrapped__
    return _way_in(stock(call)) if is_library_function(call) and not hasattr(call, "__wrapped__") else None


def _is_ours(call: Any) -> bool:
    """Whether this package has put it around a pipeline's call, whose result it passes on."""
    return type(call) is types.FunctionType and call.__globals__["__name__"].startswith("wan_patches.")


@functools.lru_cache(maxsize=64)
def _way_in(call: types.FunctionType) -> str | None:
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
    joined = [part for part in _parts(function) if not JOINED_NAMES.isdisjoint(_names(part))]
    return DECODED.get(fingerprint(joined))


def _parts(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The statements of a function that hold no others, and what the others ask."""
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


def _decodes_as_known(vae: Any) -> bool:
    """Whether what `_decode` gives is what pipelines get from `decode`, and nobody looks at it on the way."""
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


def _decodes_piecewise(vae: Any) -> bool:
    """Whether it decodes one latent frame after another, and joins and clamps them, as far as its methods go."""
    function = inspect.getattr_static(type(vae), "_decode", None)
    return has_library_methods(vae, "_decode", "clear_cache") and is_known(
        function, AUTOENCODER, "AutoencoderKLWan._decode"
    )


def _reason_against_now(vae: Any, z: torch.Tensor) -> str | None:
    """Why these latents are decoded as a whole; None where they need not be."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    scale = vae.spatial_compression_ratio
    tile = vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale
    if vae.use_tiling and (z.shape[-2] > tile[0] or z.shape[-1] > tile[1]):
        return "the autoencoder decodes the video tile after tile (enable_tiling)"
    if not (is_library_function(wan.unpatchify) and are_torch_functions(torch.cat, torch.clamp)):
        return "what joins or clamps decoded frames was replaced"
    return "a mode, a transform or a compiler looks at the operations" if is_watched() else None
