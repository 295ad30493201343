"""Parts of a transformer with no-op layers: only the operations between the layers remain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm


def block_without_layers(dim: int, device: torch.device) -> SimpleNamespace:
    """Returns an object to pass as `self` to the forward of a Wan or Helios block.

    Its attention and feed-forward return their input.
    """
    plain = FP32LayerNorm(dim, 1e-6, elementwise_affine=False)
    affine = FP32LayerNorm(dim, 1e-6, elementwise_affine=True).to(device)
    return SimpleNamespace(
        **{"norm1": plain, "norm2": affine, "norm3": plain, "attn1": _same, "attn2": _same, "ffn": _same},
        **{"guidance_cross_attn": False, "scale_shift_table": (torch.randn(1, 6, dim) / dim**0.5).to(device)},
    )


class AttentionWithoutLayers(SimpleNamespace):
    """A module to pass to the processor of a Wan or Helios self-attention.

    `attend` replaces `dispatch_attention_fn` and stores queries and keys, `(batch, seq, heads, head_dim)`, in
    `attended`.
    """

    def __init__(self, heads: int, query: torch.Tensor, key: torch.Tensor, norm: Any = None) -> None:
        """query, key: outputs of the projections, `(batch, seq, dim)`. norm: applied to both; None for no norm."""
        self.attended: list[torch.Tensor] = []
        super().__init__(
            **{"heads": heads, "add_k_proj": None, "fused_projections": False, "is_cross_attention": False},
            **{"is_amplify_history": False, "norm_q": norm or _same, "norm_k": norm or _same},
            **{"to_q": lambda x: query, "to_k": lambda x: key, "to_v": _same, "to_out": [_same, _same]},
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        """Stores queries and keys, and returns the values."""
        self.attended[:] = query, key
        return value


def _same(x: torch.Tensor, *more: Any) -> torch.Tensor:
    return x
