"""Enables streams in diffusers' group offloading on devices that it does not support.

Up to 0.40, `apply_group_offloading(use_stream=True)` asks for CUDA, then for XPU, and raises otherwise. The rest of
that module takes streams from any accelerator of torch, with the same order of copies and waits that later versions use
on every device, so only the two questions need another answer. `enable_offload` changes them while it creates hooks for
such a device; `enable()` does not, because no other code depends on the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

from wan_patches.patching.codeswap import functions_behind, has_fingerprint, site, stock
from wan_patches.patching.fingerprints import GROUP_OFFLOADING, PRE_FORWARD_WITHOUT_WAIT, texts
from wan_patches.patching.rewrite import Replace, Unknown, rewritten

try:
    from diffusers.hooks import group_offloading
except ImportError:  # before 0.33
    group_offloading = None  # type: ignore[assignment]

__all__ = ["Streams", "group_offloading", "making", "streams_on"]

_AVAILABLE, _STREAM = "_wan_patches_stream_available", "_wan_patches_stream"

EDITS = (
    Replace("torch.cuda.is_available()", f"{_AVAILABLE}(onload_device)"),
    Replace("torch.cuda.Stream()", f"{_STREAM}(onload_device)"),
)

#: The functions that use the stream later: they get it from `torch.accelerator` and wait for copies and computation.
_REQUIRES = (
    "ModuleGroup.__init__",
    "ModuleGroup._onload_from_memory",
    "ModuleGroup._offload_to_memory",
    "GroupOffloadingHook.pre_forward",
)

_lock = threading.RLock()


@dataclass(frozen=True)
class Streams:
    """Whether group offloading can copy on a stream of a device, and why.

    usable: whether it can.
    enabled_here: whether diffusers does not support it and `making` enables it.
    reason: an explanation in words.
    """

    usable: bool
    enabled_here: bool
    reason: str


def streams_on(device: torch.device) -> Streams:
    """Determines whether the installed torch and diffusers support streams on a device. Requires group offloading."""
    module = group_offloading
    reason = _obstacle(device, module)
    if reason:
        return Streams(False, False, reason)
    if _is_stock(device, module):
        return Streams(True, False, "diffusers' own path")
    try:
        accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        if accelerator is None or accelerator.type != device.type:
            raise Unknown(f"torch.accelerator is {accelerator}, not {device.type}")
        for qualname in _REQUIRES:
            if not _says(module, qualname, texts(GROUP_OFFLOADING, qualname)):
                raise Unknown(f"the text of {qualname} is not known")
        rewritten(stock(_function(module)), EDITS)
    except Unknown as error:
        return Streams(
            False, False, f"the installed diffusers supports streams on CUDA or XPU only, and was left alone: {error}"
        )
    return Streams(
        True, True, f"the installed diffusers supports CUDA or XPU only; it is given streams of torch.{device.type}"
    )


@contextmanager
def making(device: torch.device, streams: Streams) -> Iterator[None]:
    """Makes `apply_group_offloading(use_stream=True)` create streams of `device` in the block, besides CUDA and XPU."""
    with _lock if streams.enabled_here else nullcontext():
        if not streams.enabled_here:
            yield
            return
        place = site(_function(group_offloading))
        place.add(EDITS, {_AVAILABLE: _available, _STREAM: _stream})
        try:
            yield
        finally:
            place.remove(EDITS)


def _available(device: Any) -> bool:
    """Replaces `torch.cuda.is_available()`."""
    return torch.device(device).type not in ("cuda", "xpu") or torch.cuda.is_available()


def _stream(device: Any) -> Any:
    """Replaces `torch.cuda.Stream()`."""
    device = torch.device(device)
    return torch.cuda.Stream() if device.type in ("cuda", "xpu") else _backend(device).Stream()


def _obstacle(device: torch.device, module: ModuleType) -> str:
    backend = _backend(device)
    if not all(hasattr(backend, name) for name in ("Stream", "stream", "current_stream")):
        return f"torch.{device.type} has no streams"
    if _says(module, "GroupOffloadingHook.pre_forward", {PRE_FORWARD_WITHOUT_WAIT}):
        return "the installed diffusers (before 0.35) runs the last group before its weights have arrived"
    if device.index and device.index != (current := backend.current_device()):
        return (
            f"diffusers creates streams on the current device, which is {device.type}:{current}; "
            f"call torch.{device.type}.set_device({device.index}) first"
        )
    return ""


def _is_stock(device: torch.device, module: ModuleType) -> bool:
    if hasattr(module, "TorchDeviceBackend"):  # since 0.41: any backend
        return True
    return device.type == "cuda" or (device.type == "xpu" and not torch.cuda.is_available())


def _backend(device: torch.device) -> Any:
    try:
        return torch.get_device_module(device)
    except RuntimeError:  # torch has no module for this device type
        return None


def _function(module: ModuleType) -> FunctionType:
    found = _functions(module, "apply_group_offloading")
    if not found:
        raise Unknown("apply_group_offloading is not a Python function")
    return found[0]


def _says(module: ModuleType, qualname: str, fingerprints: Container[str]) -> bool:
    return any(has_fingerprint(function, fingerprints) for function in _functions(module, qualname))


def _functions(module: ModuleType, qualname: str) -> list[FunctionType]:
    """Returns the functions behind a name that the module itself defines."""
    value: Any = module
    for name in qualname.split("."):
        value = getattr(value, name, None)
    behind = functions_behind(value, module.__file__)
    return [function for function in behind if function.__code__.co_filename == module.__file__]
