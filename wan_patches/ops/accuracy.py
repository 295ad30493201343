"""What a CLOSE operation must prove at first sight: that it is as accurate as what it stands for."""

from __future__ import annotations

import torch

SAMPLE = 64  # tokens that are looked at, or up to twice as many
_MARGIN = 1.01


def double(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64 on the CPU: NPUs do not compute in it."""
    return x.detach().cpu().double()


def is_as_accurate(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether the mean error of `ours` is at most 1.01 times that of `stock`; `truth` is what `double` gives."""
    errors = [(double(found) - truth).abs().mean() for found in (ours, stock)]
    return bool(errors[0] <= _MARGIN * errors[1])
