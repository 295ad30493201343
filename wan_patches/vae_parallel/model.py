"""Checks on the installed `AutoencoderKLWan` and on calls of it."""

from __future__ import annotations

import torch
from torch import nn

from wan_patches.patching.fingerprints import AUTOENCODER, is_known

__all__ = ["MODEL", "is_recorded", "is_wan_vae", "require_known"]

MODEL = "AutoencoderKLWan"


def is_wan_vae(vae: object) -> bool:
    """Whether an object is an `AutoencoderKLWan`, the only class that can be parallelised."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        return False
    return isinstance(vae, AutoencoderKLWan)


def require_known(cls: type, method: str, name: str) -> None:
    """Raises RuntimeError unless a method has a known text.

    Args:
        cls: the class at hand, whose method may have been replaced.
        method: name of the method.
        name: diffusers' name of the class, under which the known texts are registered.
    """
    if is_known(getattr(cls, method, None), AUTOENCODER, f"{name}.{method}"):
        return
    raise RuntimeError(
        f"{cls.__name__}.{method} differs from all known versions (new in diffusers, or replaced by other code), so "
        "the VAE cannot be made parallel"
    )


def is_recorded(vae: nn.Module, x: torch.Tensor) -> bool:
    """Whether autograd records the VAE's computation; autograd cannot follow it to other ranks."""
    return torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in vae.parameters()))
