"""The parameters of a convolution in three dimensions, for the ops that combine it with what follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Convolution(NamedTuple):
    """A convolution of input that is already padded; its fields are arguments of `torch.nn.functional.conv3d`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: Any) -> Convolution:
        """Returns the parameters of a `torch.nn.Conv3d`."""
        return cls(conv.weight, conv.bias, conv.stride, conv.dilation, conv.groups)

    def __call__(self, x: torch.Tensor, *, biased: bool = True) -> torch.Tensor:
        """Returns the convolution of `x`, `(batch, channels, frames, height, width)`, with or without the bias."""
        bias = self.bias if biased else None
        return F.conv3d(x, self.weight, bias, self.stride, 0, self.dilation, self.groups)
