"""The accuracy requirement of CLOSE operations, checked at first sight: as accurate as the operation they replace."""

from __future__ import annotations

import torch

SAMPLE = 64  # tokens compared, or up to twice as many
_MARGIN = 1.01


def double(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` in float64 on the CPU, because NPUs do not compute in float64."""
    return x.detach().cpu().double()


def is_as_accurate(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether the mean error of `ours` is at most 1.01 times that of `stock`; `truth` comes from `double`."""
    errors = [(double(found) - truth).abs().mean() for found in (ours, stock)]
    return bool(errors[0] <= _MARGIN * errors[1])
