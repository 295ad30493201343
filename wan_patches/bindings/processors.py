"""Checks that diffusers' image and video processors still behave as known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.configuration_utils import FrozenDict

from wan_patches.bindings.stock_functions import has_library_methods
from wan_patches.patching.fingerprints import PROCESSOR, is_known

_NONE = object()


def is_stock(processor: object, methods: Iterable[str], **settings: Any) -> bool:
    """Whether these methods have known texts and no wrappers, and the processor's configuration matches `settings`.

    A processor may be any object with the methods that a pipeline calls. If its methods are not the library's, its
    configuration is not read.
    """
    methods = tuple(methods)
    if not has_library_methods(processor, *methods) or not all(_is_known(type(processor), name) for name in methods):
        return False
    config = getattr(processor, "config", None)
    return isinstance(config, FrozenDict) and all(
        getattr(config, key, _NONE) == value for key, value in settings.items()
    )


def _is_known(cls: type, name: str) -> bool:
    method = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    function = method.__func__ if isinstance(method, staticmethod) else method
    return is_known(function, PROCESSOR, f"VideoProcessor.{name}")
