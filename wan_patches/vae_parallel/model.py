"""What must be known of the installed `AutoencoderKLWan`, and of a call of it."""

from __future__ import annotations

import torch
from torch import nn

from wan_patches.patching.fingerprints import AUTOENCODER, is_known

__all__ = ["MODEL", "is_recorded", "is_wan_vae", "require_known"]

MODEL = "AutoencoderKLWan"


def is_wan_vae(vae: object) -> bool:
    """Whether an object is an `AutoencoderKLWan`, which can be made parallel."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        return False
    return isinstance(vae, AutoencoderKLWan)


def require_known(cls: type, method: str, name: str) -> None:
    """Raises RuntimeError unless the text of a method is known here.

    Args:
        cls: the class as it is, whose method may have been replaced.
        method: its name.
        name: diffusers' name of the class under which its texts are known.
    """
    if is_known(getattr(cls, method, None), AUTOENCODER, f"{name}.{method}"):
        return
    raise RuntimeError(
        f"{cls.__name__}.{method}, as it is installed or as something has changed it, is not known here, so the VAE "
        "cannot be made parallel"
    )


def is_recorded(vae: nn.Module, x: torch.Tensor) -> bool:
    """Whether autograd records a computation of the VAE, which it cannot follow to other ranks."""
    return torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in vae.parameters()))
