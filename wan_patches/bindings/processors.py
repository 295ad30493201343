"""Whether diffusers' image and video processors still do what is known of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.configuration_utils import FrozenDict

from wan_patches.bindings.originals import has_librarys
from wan_patches.patching.fingerprints import PROCESSOR, is_known

_NONE = object()


def is_stock(processor: object, methods: Iterable[str], **settings: Any) -> bool:
    """Whether these methods are as known, with nobody's code around them, and the processor's settings are `settings`.

    A processor may be any object with the methods that a pipeline calls; of one with others' methods nothing is read.
    """
    methods = tuple(methods)
    if not has_librarys(processor, *methods) or not all(_is_known(type(processor), name) for name in methods):
        return False
    config = getattr(processor, "config", None)
    return isinstance(config, FrozenDict) and all(
        getattr(config, key, _NONE) == value for key, value in settings.items()
    )


def _is_known(cls: type, name: str) -> bool:
    method = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    function = method.__func__ if isinstance(method, staticmethod) else method
    return is_known(function, PROCESSOR, f"VideoProcessor.{name}")
