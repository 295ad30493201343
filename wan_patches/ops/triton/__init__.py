"""Kernels for GPUs. Triton is imported only for tensors on a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util

import torch


def is_usable(device: torch.device) -> bool:
    """Whether there are kernels for tensors of `device` and Triton can be imported; says nothing about launches."""
    return device.type == "cuda" and not _failure()


def why_unusable(device: torch.device) -> str | None:
    """Returns why `is_usable` is false, or None."""
    return None if is_usable(device) else _failure() or "kernels are for GPUs"


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches there, regardless of the arguments' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _failure() -> str:
    """Returns why Triton cannot be imported, or an empty string; tries it once per process."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # such as a library that is missing, or a Triton for another Python
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return ""
