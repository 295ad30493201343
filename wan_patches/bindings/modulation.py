"""adaLN modulation and gated residuals, as called by the transformer blocks of Wan, Helios and related models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from wan_patches.bindings.forwards import has_global_hooks, is_untouched, runs
from wan_patches.bindings.stock_functions import are_torch_functions, is_library_function
from wan_patches.ops import fused_norm
from wan_patches.ops import modulation as ops
from wan_patches.ops.dispatch import SMALL, Op
from wan_patches.ops.modulation import Modulation, RowPerToken, SegmentedModulation
from wan_patches.ops.tracing import is_observed, is_transformed
from wan_patches.patches.modulation import CLOSE_PREFIX, NORM, OF_BLOCK, PREFIX
from wan_patches.patching import tally

Stock = Callable[..., torch.Tensor]


def modulated_norm(norm: nn.Module, x: torch.Tensor, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """Computes `(norm(x.float()) * (1 + scale) + shift).type_as(x)`; see `wan_patches.ops.modulation`."""
    return _around(norm, ops.modulated_norm, x, norm, scale, shift)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """Computes `(x.float() + y * gate).type_as(x)`; see `wan_patches.ops.modulation`."""
    return ops.gated_residual(x, y, gate, cast)


def residual_norm(
    norm: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None = None,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a residual sum and its norm; see `wan_patches.ops.modulation`."""
    return _around(norm, ops.residual_norm, x, y, gate, norm, scale, shift)


def cast_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Computes `norm(x.float()).type_as(x)`; see `wan_patches.ops.modulation`."""
    return _around(norm, ops.cast_norm, x, norm)


def close_modulated_norm(norm: nn.Module, x: torch.Tensor, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """Computes `modulated_norm` with different rounding; see `wan_patches.ops.fused_norm`."""
    return _around(norm, fused_norm.modulated_norm, x, norm, scale, shift)


def close_residual_norm(
    norm: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None = None,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `residual_norm` with different rounding; see `wan_patches.ops.fused_norm`."""
    return _around(norm, fused_norm.residual_norm, x, y, gate, norm, scale, shift)


def close_cast_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Computes `cast_norm` with different rounding; see `wan_patches.ops.fused_norm`."""
    return _around(norm, fused_norm.cast_norm, x, norm)


def scale_shift(
    stock: Stock, norm: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Computes `stock(norm(x.float()), x, scale, shift)`, which in Kandinsky 6 is `modulated_norm`.

    scale, shift: `(batch, dim)` in any dtype.
    """
    return _by_function(stock, modulated_norm, norm, x, scale, shift)


def close_scale_shift(
    stock: Stock, norm: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Computes `scale_shift` with different rounding; see `wan_patches.ops.fused_norm`."""
    return _by_function(stock, close_modulated_norm, norm, x, scale, shift)


def _by_function(
    stock: Stock,
    ours: Callable[..., torch.Tensor],
    norm: nn.Module,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    if torch.compiler.is_compiling() or not is_library_function(stock):
        return stock(norm(x.float()), x, scale, shift)
    return ours(norm, x, _of_all_tokens(scale, x), _of_all_tokens(shift, x))


def gate_sum(stock: Stock, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Computes `stock(x, y, gate)`, which in Kandinsky 6 is `gated_residual`.

    gate: `(batch, dim)` in any dtype.
    """
    if torch.compiler.is_compiling() or not is_library_function(stock):
        return stock(x, y, gate)
    return gated_residual(x, y, _of_all_tokens(gate, x), cast=True)


def _of_all_tokens(modulation: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns a modulation of `(batch, dim)` in fp32, with the axes of `x`."""
    if x.dim() > 2 and modulation.dim() == 2:
        modulation = modulation.unflatten(0, (-1, *(1,) * (x.dim() - 2)))
    return modulation.float()


def _around(norm: nn.Module, op: Op, *args: Any) -> Any:
    """Calls `op`, whose first argument is the hidden states, or its reference if `norm` requires stock's operations."""
    if torch.compiler.is_compiling():
        return op(*args)
    # for few elements the norm is called as in stock, so its type does not matter
    reason = op.why_small(args[0]) or _reason_against_norm(norm)
    if reason is None:
        return op(*args)
    tally.count(op.name, "", reason)
    return op.reference(*args)


def modulations(table: torch.Tensor, temb: torch.Tensor | SegmentedModulation) -> Sequence[Modulation]:
    """Adds a block's table to the embedded timestep of each token: the six modulations of the block.

    temb: `(batch, seq, 6, dim)`, or its `SegmentedModulation`.

    Returns:
        Six modulations of `(batch, rows, dim)`, without the third axis of stock's tensors: each a
        `SegmentedModulation`, a single row if all tokens share it, or a `RowPerToken`. If anything observes the
        operations, stock's tensors.
    """
    if isinstance(temb, SegmentedModulation):
        return temb._replace(rows=temb.rows.float()).added_to(table)
    if not (is_observed(table, temb) or _are_few(temb.numel() // 6, temb)):
        if not _is_repeated(temb, 1):
            return tuple(map(RowPerToken, table.split(1, dim=1), temb.unbind(dim=2)))
        temb = temb[:, :1]
    return tuple(modulation.squeeze(2) for modulation in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2))


def segmented_modulation(
    model: Any, history: torch.Tensor, current: torch.Tensor
) -> torch.Tensor | SegmentedModulation:
    """Joins the modulations of Helios' history tokens and current tokens.

    Returns a `SegmentedModulation`, or stock's `(batch, 6, seq, dim)` if foreign code may see the result.

    history, current: `(batch, 6, tokens, dim)`, of the preceding tokens and of the tokens being generated.
    """
    reason = _reason_against_rows(model, history, current)
    if reason is None and not (_is_repeated(history, 2) and _is_repeated(current, 2)):
        reason = "tokens of one kind have several rows"
    if reason is not None:
        tally.note("rows of two kinds", "", reason)
        return torch.cat([history, current], dim=2)
    tally.note("rows of two kinds", "one row for each kind of tokens")
    if history.shape[2] == 0:
        return current[:, :, 0]
    split_index, seq = history.shape[2], history.shape[2] + current.shape[2]
    return SegmentedModulation(torch.stack((history[:, :, 0], current[:, :, 0]), dim=1), split_index, seq)


def tokens_first(temb: torch.Tensor | SegmentedModulation) -> torch.Tensor | SegmentedModulation:
    """Permutes `(batch, 6, seq, dim)` to `(batch, seq, 6, dim)`; a `SegmentedModulation` has that layout already."""
    return temb if isinstance(temb, SegmentedModulation) else temb.permute(0, 2, 1, 3)


def current_row(model: Any, history: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Returns the embedding for Helios' output norm, which reads only the current tokens: one row, or stock's tensor.

    history, current: `(batch, tokens, dim)`.
    """
    if _reason_against_rows(model, history, current) is not None or not _is_repeated(current, 1):
        return torch.cat([history, current], dim=1)
    return current[:, :1]


def _is_repeated(tensor: torch.Tensor, dim: int) -> bool:
    """Whether all elements along `dim` are the same memory."""
    return not torch.compiler.is_compiling() and (tensor.stride(dim) == 0 or tensor.shape[dim] == 0)


def _reason_against_rows(model: Any, history: torch.Tensor, current: torch.Tensor) -> str | None:
    """Why a Helios model has to pass stock's tensors to its blocks and its output norm, or None."""
    if torch.compiler.is_compiling():
        return "it is being compiled"
    batch, dim = current.shape[0], current.shape[-1]
    if _are_few(batch * (history.shape[-2] + current.shape[-2]) * dim, current):
        return SMALL
    if (reason := reason_against_segments(model, "HeliosTransformerBlock")) is not None:
        return reason
    if type(model.norm_out).__name__ != "HeliosOutputNorm" or not _is_patched(model.norm_out, NORM):
        return "its output norm is another, or does not run what is patched here alone"
    return None


def _are_few(elements: int, like: torch.Tensor) -> bool:
    """Whether hidden states of this many elements use stock's operations, so that stock's tensors suffice."""
    return elements < ops.modulated_norm.least_for(like)


def reason_against_segments(model: Any, block: str) -> str | None:
    """Why the blocks of `model` need stock's tensors, or None if they accept a `SegmentedModulation`.

    block: the required class name of the blocks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is being compiled"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if has_global_hooks():
        return "there are global module hooks"
    if is_transformed():
        return "a mode or a transform looks on"
    if not are_torch_functions(torch.cat):
        return "torch's functions are not its own"
    for module in model.blocks:
        if type(module).__name__ != block or not _is_patched(module, OF_BLOCK):
            return "a block is another, or does not run what is patched here alone"
    return None


def _is_patched(module: nn.Module, name: str) -> bool:
    """Whether a module runs code that calls `name`, in its exact or its close form."""
    return runs(module, name, name.replace(PREFIX, CLOSE_PREFIX))


def _reason_against_norm(norm: nn.Module) -> str | None:
    """Why a norm has to be called as in stock, or None if it can be called on a few tokens at a time."""
    if not are_torch_functions(F.layer_norm, torch.layer_norm):
        return "torch's layer norm is not its own"
    if type(norm) is not FP32LayerNorm and not (type(norm) is nn.LayerNorm and norm.weight is norm.bias is None):
        return f"the norm is {type(norm).__name__}"
    if not is_untouched(norm):
        return "the norm has hooks, or a forward that is not diffusers'"
    if norm.weight is not None and torch.is_grad_enabled():
        return "gradients are enabled"
    return None
