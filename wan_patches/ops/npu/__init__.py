"""Operations of torch_npu, for tensors on Ascend NPUs.

Written after the documentation and the schemas of its wheels (`schemas.json`), tested with a stand-in on an emulated
device, and not run on hardware. torch_npu is imported where a tensor on an NPU is about to be computed with, and
nowhere else: whether it is installed says nothing about whether it works.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_problems: dict[str, str] = {}


@functools.cache
def function(path: str) -> Callable[..., Any] | None:
    """The function at `"module:name"`, as `"torch_npu:npu_rotary_mul"`; None if it cannot be had, see `problems`."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:  # without CANN not only an ImportError
        _problems[path] = f"{type(error).__name__}: {error}"
        return None


def problem(path: str) -> str:
    """Why `function` gave None for `path`; nothing if it did not."""
    return _problems.get(path, "")


def problems() -> list[str]:
    """A sentence for each reason why functions that were wanted cannot be had."""
    wanted: dict[str, list[str]] = {}
    for path, reason in _problems.items():
        wanted.setdefault(reason, []).append(path.replace(":", "."))
    return [f"{', '.join(paths)} cannot be used, other formulations run: {why}" for why, paths in wanted.items()]


def forget() -> None:
    """Looks for functions anew."""
    function.cache_clear()
    _problems.clear()
