"""Operations of torch_npu, for tensors on Ascend NPUs.

Written from its documentation and the schemas of its wheels (`schemas.json`) and tested with a stand-in on an emulated
device; not run on hardware. torch_npu is imported only when a computation with an NPU tensor is about to run: an
installed torch_npu may still be unusable.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_problems: dict[str, str] = {}


@functools.cache
def function(path: str) -> Callable[..., Any] | None:
    """Returns the function at `"module:name"`, such as `"torch_npu:npu_rotary_mul"`.

    None if it is unavailable, see `problems`.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:  # without CANN, other errors than ImportError
        _problems[path] = f"{type(error).__name__}: {error}"
        return None


def problem(path: str) -> str:
    """Returns why `function` returned None for `path`, or an empty string."""
    return _problems.get(path, "")


def problems() -> list[str]:
    """Returns a sentence for each reason why requested functions are unavailable."""
    wanted: dict[str, list[str]] = {}
    for path, reason in _problems.items():
        wanted.setdefault(reason, []).append(path.replace(":", "."))
    return [f"{', '.join(paths)} cannot be used, other formulations run: {why}" for why, paths in wanted.items()]


def forget() -> None:
    """Clears the cache, so that functions are looked up again."""
    function.cache_clear()
    _problems.clear()
