"""Blocks of Wan, Helios and their relatives: adaLN modulation, gated residuals, and Helios' two kinds of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wan_patches.registry import Patch, Target
from wan_patches.rewrite import Edit, Replace

if TYPE_CHECKING:
    from wan_patches.ops.modulation import Modulation

_NORM, _RESIDUAL, _CAST = "_wan_patches_modulated_norm", "_wan_patches_gated_residual", "_wan_patches_cast_norm"
_OF_MODEL, _OF_OUTPUT = "_wan_patches_two_rows", "_wan_patches_current_row"
_OF_BLOCK, _OF_TOKENS = "_wan_patches_modulations", "_wan_patches_modulations_of_tokens"


def _modulated(times: int) -> Replace:
    return Replace("(NORM(X.float()) * (1 + SCALE) + SHIFT).type_as(X)", f"{_NORM}(NORM, X, SCALE, SHIFT)", times)


def _block(casts: int = 1) -> tuple[Edit, ...]:
    """What every block has; `casts` of its norms are not modulated."""
    return (
        _modulated(2),
        Replace("(X.float() + attn_output * GATE).type_as(X)", f"{_RESIDUAL}(X, attn_output, GATE)"),
        Replace("(X.float() + ff_output.float() * GATE).type_as(X)", f"{_RESIDUAL}(X, ff_output, GATE, True)"),
        Replace("self.norm2(X.float()).type_as(X)", f"{_CAST}(self.norm2, X)", casts),
    )


_ROW_PER_TOKEN = (  # of Wan 2.2 TI2V and Helios
    Replace("(TABLE.unsqueeze(0) + temb.float()).chunk(6, dim=2)", f"{_OF_TOKENS}(TABLE, temb)"),
    Replace("MODULATION.squeeze(2)", "MODULATION", 6),
)
_WAN_BLOCK = (*_block(), *_ROW_PER_TOKEN)
_HELIOS_BLOCK = (
    *_block(casts=2),
    *_ROW_PER_TOKEN,
    Replace("(TABLE + temb.float()).chunk(6, dim=1)", f"{_OF_BLOCK}(TABLE, temb)"),
)
_HELIOS_MODEL = (
    Replace(
        "torch.cat([timestep_proj_t0, timestep_proj], dim=2)", f"{_OF_MODEL}(self, timestep_proj_t0, timestep_proj)"
    ),
    Replace("torch.cat([temb_t0, temb], dim=1)", f"{_OF_OUTPUT}(self, temb_t0, temb)"),
)


def _patch(module: str, *targets: Target) -> Patch:
    return Patch(
        name="modulation",
        module=f"diffusers.models.transformers.{module}",
        targets=targets,
        calls={name: f"{__name__}:{name.removeprefix('_wan_patches_')}" for name in _CALLS},
        implementations={
            "CPUs": "a few tokens at a time",
            "GPUs": "one kernel after the norm, and for a gated residual",
            "compilers, autograd": "stock's operations",
        },
    )


_CALLS = (_NORM, _RESIDUAL, _CAST, _OF_MODEL, _OF_OUTPUT, _OF_BLOCK, _OF_TOKENS)
_OUTPUT = (_modulated(1),)

PATCHES = (
    _patch(
        "transformer_wan",
        Target("WanTransformerBlock.forward", _WAN_BLOCK),
        Target("WanTransformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_wan_vace",
        Target("WanVACETransformerBlock.forward", _block()),
        Target("WanVACETransformer3DModel.forward", _OUTPUT),
    ),
    _patch("transformer_wan_animate", Target("WanTransformerBlock.forward", _WAN_BLOCK)),
    _patch(
        "transformer_chronoedit",
        Target("WanTransformerBlock.forward", _WAN_BLOCK),
        Target("ChronoEditTransformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_skyreels_v2",
        Target("SkyReelsV2TransformerBlock.forward", _block()),
        Target("SkyReelsV2Transformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_helios",
        Target("HeliosTransformerBlock.forward", _HELIOS_BLOCK),
        Target("HeliosOutputNorm.forward", _OUTPUT),
        Target("HeliosTransformer3DModel.forward", _HELIOS_MODEL),
    ),
)


def modulated_norm(norm: Any, x: Any, scale: Modulation, shift: Modulation) -> Any:
    """`(norm(x.float()) * (1 + scale) + shift).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return (ops.modulated_norm if _is_plain(norm) else ops.plain_modulated_norm)(x, norm, scale, shift)


def gated_residual(x: Any, y: Any, gate: Modulation, cast: bool = False) -> Any:
    """`(x.float() + y * gate).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return ops.gated_residual(x, y, gate, cast)


def cast_norm(norm: Any, x: Any) -> Any:
    """`norm(x.float()).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return (ops.cast_norm if _is_plain(norm) else ops.plain_cast_norm)(x, norm)


def modulations(table: Any, temb: Any) -> Any:
    """What a block's table and the model's `temb`, `(batch, 6, dim)` or `TwoRows` of it, make: six modulations."""
    from wan_patches.ops.modulation import TwoRows

    return temb.added_to(table) if isinstance(temb, TwoRows) else (table + temb.float()).chunk(6, dim=1)


def modulations_of_tokens(table: Any, temb: Any) -> Any:
    """The same of a `temb` for each token, `(batch, seq, 6, dim)`, where the third axis of the results is gone.

    One row each where all tokens have the same memory; else `RowPerToken`, or stock's tensors for who looks into them.
    """
    from wan_patches.ops.modulation import RowPerToken
    from wan_patches.ops.tracing import is_observed

    if _is_repeated(temb, 1):
        temb = temb[:, :1]
    elif not is_observed(table, temb):
        return tuple(map(RowPerToken, table.split(1, dim=1), temb.unbind(dim=2)))
    return tuple(modulation.squeeze(2) for modulation in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2))


def two_rows(model: Any, history: Any, current: Any) -> Any:
    """What Helios hands its blocks: `TwoRows`, or stock's `(batch, 6, seq, dim)` where a block may not know them.

    history, current: `(batch, 6, tokens, dim)` of the tokens before and of those that are generated.
    """
    import torch

    from wan_patches.ops.modulation import TwoRows

    if _reason_against_rows(model) is not None or not (_is_repeated(history, 2) and _is_repeated(current, 2)):
        return torch.cat([history, current], dim=2)
    if history.shape[2] == 0:
        return current[:, :, 0]
    return TwoRows(torch.stack((history[:, :, 0], current[:, :, 0]), dim=1), history.shape[2])


def current_row(model: Any, history: Any, current: Any) -> Any:
    """What Helios hands its output norm, which looks at the tokens that are generated: one row, or stock's tensor.

    history, current: `(batch, tokens, dim)`.
    """
    import torch

    if _reason_against_rows(model) is not None or not _is_repeated(current, 1):
        return torch.cat([history, current], dim=1)
    return current[:, :1]


def _is_repeated(tensor: Any, dim: int) -> bool:
    """Whether all that lies along `dim` is one and the same memory."""
    import torch

    return not torch.compiler.is_compiling() and (tensor.stride(dim) == 0 or tensor.shape[dim] == 0)


def _reason_against_rows(model: Any) -> str | None:
    """Why a Helios model hands its blocks and its output norm what stock does; None where it need not."""
    import torch

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is being compiled"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    for module in (*model.blocks, model.norm_out):
        if type(module).__name__ not in ("HeliosTransformerBlock", "HeliosOutputNorm"):
            return f"it has a {type(module).__name__} in it"
        if module._forward_hooks or module._forward_pre_hooks:
            return "a block or the output norm has hooks"
    return None


def _is_plain(norm: Any) -> bool:
    """Whether a norm is what it says, so that it can be asked about a few tokens at a time."""
    import torch
    from diffusers.models.normalization import FP32LayerNorm

    return not torch.compiler.is_compiling() and (
        type(norm) is FP32LayerNorm
        and "forward" not in vars(norm)
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and not torch.nn.modules.module._has_any_global_hook()
        and (norm.weight is None or not torch.is_grad_enabled())
    )
