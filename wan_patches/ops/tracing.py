"""Detects observers of tensor operations, which have to see the plain formulation."""

from __future__ import annotations

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack as _modes
from torch.utils._device import DeviceContext


def is_observed(*tensors: torch.Tensor) -> bool:
    """Whether a compiler, autograd, a transform, a tracer, autocast or a tensor subclass takes part in what follows.

    tensors: all inputs of the following computation.
    """
    return (
        torch.compiler.is_compiling()
        or any(type(tensor) not in _PLAIN for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or is_transformed()
        or torch.is_autocast_enabled()
        or torch.is_autocast_enabled("cpu")
    )


def is_transformed() -> bool:
    """Whether a torch.func transform, a tracer, a mode or forward-mode autograd is active.

    The mode that only sets the default device (`torch.device`) does not count.
    """
    return (
        _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0  # `make_fx`, fake tensors, counters of operations
        or (_len_torch_function_stack() > 0 and any(type(mode) is not DeviceContext for mode in _modes()))
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)
