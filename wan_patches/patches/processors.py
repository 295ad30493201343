"""What the image and video patches rely on in diffusers' processors, and whether it still is as known."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from wan_patches.codeswap import stock
from wan_patches.originals import has_librarys
from wan_patches.registry import Known
from wan_patches.rewrite import Unknown, fingerprint

# one text each from diffusers 0.34 to 0.42
_TEXTS = {
    "preprocess": "966aaa5eac62bbcf",
    "resize": "83a38abfdda01dd5",
    "pil_to_numpy": "d6aef57673b3e897",
    "numpy_to_pt": "36b6e40b46a8e664",
    "normalize": "9cd685efad042124",
    "postprocess": "8563efb3eb63cfd0",
    "denormalize": "4fc9adfc81f2d760",
    "_denormalize_conditionally": "091492619ecf6918",
    "pt_to_numpy": "ee73951b57c77e96",
    "numpy_to_pil": "73eb64feb92bf0fd",
    "preprocess_video": ("3df7fb28b8f274e5", "5ce0a8d003660ecb"),
}

PREPROCESS = ("preprocess", "resize", "pil_to_numpy", "numpy_to_pt", "normalize")
_NONE = object()

PREPROCESS_VIDEO = (*PREPROCESS, "preprocess_video")
POSTPROCESS = ("postprocess", "denormalize", "_denormalize_conditionally", "pt_to_numpy", "numpy_to_pil")


def known(methods: Iterable[str]) -> tuple[Known, ...]:
    """The methods as requirements of a patch."""
    return tuple(Known("diffusers.video_processor", f"VideoProcessor.{name}", _fingerprints(name)) for name in methods)


def is_stock(processor: object, methods: Iterable[str], **settings: Any) -> bool:
    """Whether these methods are as known, with nobody's code around them, and the processor's settings are `settings`.

    A processor may be any object with the methods that a pipeline calls; of one with others' methods nothing is read.
    """
    methods = tuple(methods)
    if not has_librarys(processor, *methods) or not all(_is_known(type(processor), name) for name in methods):
        return False
    from diffusers.configuration_utils import FrozenDict

    config = getattr(processor, "config", None)
    return isinstance(config, FrozenDict) and all(
        getattr(config, key, _NONE) == value for key, value in settings.items()
    )


def _is_known(cls: type, name: str) -> bool:
    method = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    function = method.__func__ if isinstance(method, staticmethod) else method
    if type(function) is not types.FunctionType:
        return False
    try:
        return fingerprint(stock(function)) in _fingerprints(name)
    except Unknown:
        return False


def _fingerprints(name: str) -> frozenset[str]:
    texts = _TEXTS[name]
    return frozenset([texts] if isinstance(texts, str) else texts)
