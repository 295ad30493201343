"""Blocks of Wan, Helios and their relatives: adaLN modulation, gated residuals, and Helios' two kinds of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan_patches.bindings.forwards import has_global_hooks, is_untouched, runs
from wan_patches.bindings.originals import are_torchs
from wan_patches.patching import tally
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Block, Edit, Replace

if TYPE_CHECKING:
    from wan_patches.ops.modulation import Modulation

_PREFIX, _CLOSE = "_wan_patches_", "_wan_patches_close_"
_RESIDUAL_NORM = "_wan_patches_residual_norm"
_NORM, _RESIDUAL, _CAST = "_wan_patches_modulated_norm", "_wan_patches_gated_residual", "_wan_patches_cast_norm"
_OF_MODEL, _OF_OUTPUT = "_wan_patches_two_rows", "_wan_patches_current_row"
_TOKENS_FIRST, _OF_BLOCK = "_wan_patches_tokens_first", "_wan_patches_modulations"


def _modulated(norm: str) -> Replace:
    return Replace(f"({norm}(X.float()) * (1 + SCALE) + SHIFT).type_as(X)", f"{_NORM}({norm}, X, SCALE, SHIFT)")


_FEED_FORWARD = Replace("(X.float() + ff_output.float() * GATE).type_as(X)", f"{_RESIDUAL}(X, ff_output, GATE, True)")


def _block(x: str, *fingerprints: str) -> tuple[Edit, ...]:
    """What blocks have whose residual sums are followed by norms at once; `x` is what they call the hidden states."""
    return (
        _modulated("self.norm1"),
        Block(
            first=f"{x} = ({x}.float() + attn_output * gate_msa).type_as({x})",
            last=f"norm_hidden_states = self.norm2({x}.float()).type_as({x})",
            replacement=f"{x}, norm_hidden_states = {_RESIDUAL_NORM}(self.norm2, {x}, attn_output, gate_msa)",
            fingerprints=frozenset(fingerprints),
        ),
        Block(
            first=f"{x} = {x} + attn_output",
            last=f"norm_hidden_states = (self.norm3({x}.float()) * (1 + SCALE) + SHIFT).type_as({x})",
            replacement=f"{x}, norm_hidden_states = {_RESIDUAL_NORM}(self.norm3, {x}, attn_output, None, SCALE, SHIFT)",
            fingerprints=frozenset(fingerprints),
        ),
        _FEED_FORWARD,
    )


_ROW_PER_TOKEN = (  # of Wan 2.2 TI2V and Helios
    Replace("(TABLE.unsqueeze(0) + temb.float()).chunk(6, dim=2)", f"{_OF_BLOCK}(TABLE, temb)"),
    Replace("MODULATION.squeeze(2)", "MODULATION", 6),
)
_PLAIN_BLOCK = _block("hidden_states", "f057115c0857cb05", "0f474dcbbe6d0913")
_VACE_BLOCK = _block("control_hidden_states", "11672d88f6fc84c0", "a9ba2b4daf22ed6f")
_WAN_BLOCK = (*_PLAIN_BLOCK, *_ROW_PER_TOKEN)
_HELIOS_BLOCK = (
    _modulated("self.norm1"),
    _modulated("self.norm3"),
    Replace("(X.float() + attn_output * GATE).type_as(X)", f"{_RESIDUAL}(X, attn_output, GATE)"),
    Replace("self.norm2(X.float()).type_as(X)", f"{_CAST}(self.norm2, X)", 2),
    _FEED_FORWARD,
    *_ROW_PER_TOKEN,
)
_HELIOS_MODEL = (
    Replace(
        "torch.cat([timestep_proj_t0, timestep_proj], dim=2)", f"{_OF_MODEL}(self, timestep_proj_t0, timestep_proj)"
    ),
    Replace("timestep_proj.permute(0, 2, 1, 3)", f"{_TOKENS_FIRST}(timestep_proj)"),
    Replace("torch.cat([temb_t0, temb], dim=1)", f"{_OF_OUTPUT}(self, temb_t0, temb)"),
)


def _patch(module: str, *targets: Target) -> Patch:
    return Patch(
        name="modulation",
        module=f"diffusers.models.transformers.{module}",
        targets=targets,
        calls={name: f"{__name__}:{name.removeprefix(_PREFIX)}" for name in _CALLS},
        implementations={
            "CPUs": "a few tokens at a time",
            "CUDA with Triton": "a kernel after the norm, and one for a gated residual",
            "compilers, autograd": "stock's operations",
        },
    )


def _close(patch: Patch) -> Patch:
    """The same with norms in one pass: other calls in the same places."""
    targets = tuple(replace(target, edits=tuple(map(_renamed, target.edits))) for target in patch.targets)
    calls = {name.replace(_PREFIX, _CLOSE): path for name, path in patch.calls.items()}
    for name in (_NORM, _CAST, _RESIDUAL_NORM):
        calls[name.replace(_PREFIX, _CLOSE)] = f"{__name__}:close_{name.removeprefix(_PREFIX)}"
    implementations = {
        **patch.implementations,
        "CUDA with Triton": "one kernel for a residual sum, its norm and the modulation",
        "NPUs": "npu_layer_norm_eval for norms without modulation",
    }
    return replace(patch, fidelity=Fidelity.CLOSE, targets=targets, calls=calls, implementations=implementations)


def _renamed(edit: Any) -> Any:
    return replace(edit, replacement=edit.replacement.replace(_PREFIX, _CLOSE))


_CALLS = (_NORM, _RESIDUAL, _CAST, _RESIDUAL_NORM, _OF_MODEL, _TOKENS_FIRST, _OF_OUTPUT, _OF_BLOCK)
_OUTPUT = (_modulated("self.norm_out"),)

_EXACT = (
    _patch(
        "transformer_wan",
        Target("WanTransformerBlock.forward", _WAN_BLOCK),
        Target("WanTransformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_wan_vace",
        Target("WanVACETransformerBlock.forward", _VACE_BLOCK),
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
        Target("SkyReelsV2TransformerBlock.forward", _PLAIN_BLOCK),
        Target("SkyReelsV2Transformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_helios",
        Target("HeliosTransformerBlock.forward", _HELIOS_BLOCK),
        Target("HeliosOutputNorm.forward", (_modulated("self.norm"),)),
        Target("HeliosTransformer3DModel.forward", _HELIOS_MODEL),
    ),
)
PATCHES = (*_EXACT, *map(_close, _EXACT))


def modulated_norm(norm: Any, x: Any, scale: Modulation, shift: Modulation) -> Any:
    """`(norm(x.float()) * (1 + scale) + shift).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return _around(norm, ops.modulated_norm, x, norm, scale, shift)


def gated_residual(x: Any, y: Any, gate: Modulation, cast: bool = False) -> Any:
    """`(x.float() + y * gate).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return ops.gated_residual(x, y, gate, cast)


def residual_norm(
    norm: Any, x: Any, y: Any, gate: Modulation | None = None, scale: Any = None, shift: Any = None
) -> tuple[Any, Any]:
    """A residual sum and its norm; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return _around(norm, ops.residual_norm, x, y, gate, norm, scale, shift)


def cast_norm(norm: Any, x: Any) -> Any:
    """`norm(x.float()).type_as(x)`; see `wan_patches.ops.modulation`."""
    from wan_patches.ops import modulation as ops

    return _around(norm, ops.cast_norm, x, norm)


def close_modulated_norm(norm: Any, x: Any, scale: Modulation, shift: Modulation) -> Any:
    """`modulated_norm`, with rounding that moves; see `wan_patches.ops.fused_norm`."""
    from wan_patches.ops import fused_norm as ops

    return _around(norm, ops.modulated_norm, x, norm, scale, shift)


def close_residual_norm(
    norm: Any, x: Any, y: Any, gate: Modulation | None = None, scale: Any = None, shift: Any = None
) -> tuple[Any, Any]:
    """`residual_norm`, with rounding that moves; see `wan_patches.ops.fused_norm`."""
    from wan_patches.ops import fused_norm as ops

    return _around(norm, ops.residual_norm, x, y, gate, norm, scale, shift)


def close_cast_norm(norm: Any, x: Any) -> Any:
    """`cast_norm`, with rounding that moves; see `wan_patches.ops.fused_norm`."""
    from wan_patches.ops import fused_norm as ops

    return _around(norm, ops.cast_norm, x, norm)


def _around(norm: Any, op: Any, *args: Any) -> Any:
    """What `op` gives, whose first argument are the hidden states; stock's operations where `norm` asks for them."""
    import torch

    if torch.compiler.is_compiling():
        return op(*args)
    # of few elements the norm is called as stock calls it, whatever it is
    reason = op.why_small(args[0]) or _reason_against_norm(norm)
    if reason is None:
        return op(*args)
    tally.count(op.name, "", reason)
    return op.reference(*args)


def modulations(table: Any, temb: Any) -> Any:
    """The six modulations that a block's table and a `temb` for each token make; `(batch, seq, 6, dim)`, or `TwoRows`.

    The third axis of stock's is gone in all of them. They are `TwoRows`, one row each where all tokens have the same
    memory, else `RowPerToken`, or stock's tensors for who looks into them.
    """
    from wan_patches.ops.modulation import RowPerToken, TwoRows
    from wan_patches.ops.tracing import is_observed

    if isinstance(temb, TwoRows):
        return temb._replace(rows=temb.rows.float()).added_to(table)
    if not (is_observed(table, temb) or _are_few(temb.numel() // 6, temb)):
        if not _is_repeated(temb, 1):
            return tuple(map(RowPerToken, table.split(1, dim=1), temb.unbind(dim=2)))
        temb = temb[:, :1]
    return tuple(modulation.squeeze(2) for modulation in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2))


def two_rows(model: Any, history: Any, current: Any) -> Any:
    """What Helios hands its blocks: `TwoRows`, or stock's `(batch, 6, seq, dim)` where others' code may look at it.

    history, current: `(batch, 6, tokens, dim)` of the tokens before and of those that are generated.
    """
    import torch

    from wan_patches.ops.modulation import TwoRows

    reason = _reason_against_rows(model, history, current)
    if reason is None and not (_is_repeated(history, 2) and _is_repeated(current, 2)):
        reason = "tokens of one kind have several rows"
    if reason is not None:
        tally.note("rows of two kinds", "", reason)
        return torch.cat([history, current], dim=2)
    tally.note("rows of two kinds", "one row for each kind of tokens")
    if history.shape[2] == 0:
        return current[:, :, 0]
    border, seq = history.shape[2], history.shape[2] + current.shape[2]
    return TwoRows(torch.stack((history[:, :, 0], current[:, :, 0]), dim=1), border, seq)


def tokens_first(temb: Any) -> Any:
    """`(batch, 6, seq, dim)` to `(batch, seq, 6, dim)`, which `TwoRows` stand for already."""
    from wan_patches.ops.modulation import TwoRows

    return temb if isinstance(temb, TwoRows) else temb.permute(0, 2, 1, 3)


def current_row(model: Any, history: Any, current: Any) -> Any:
    """What Helios hands its output norm, which looks at the tokens that are generated: one row, or stock's tensor.

    history, current: `(batch, tokens, dim)`.
    """
    import torch

    if _reason_against_rows(model, history, current) is not None or not _is_repeated(current, 1):
        return torch.cat([history, current], dim=1)
    return current[:, :1]


def _is_repeated(tensor: Any, dim: int) -> bool:
    """Whether all that lies along `dim` is one and the same memory."""
    import torch

    return not torch.compiler.is_compiling() and (tensor.stride(dim) == 0 or tensor.shape[dim] == 0)


def _reason_against_rows(model: Any, history: Any, current: Any) -> str | None:
    """Why a Helios model hands its blocks and its output norm what stock does; None where it need not."""
    import torch

    from wan_patches.ops.dispatch import SMALL

    if torch.compiler.is_compiling():
        return "it is being compiled"
    batch, dim = current.shape[0], current.shape[-1]
    if _are_few(batch * (history.shape[-2] + current.shape[-2]) * dim, current):
        return SMALL
    if (reason := reason_against_two_kinds(model, "HeliosTransformerBlock")) is not None:
        return reason
    if type(model.norm_out).__name__ != "HeliosOutputNorm" or not _is_patched(model.norm_out, _NORM):
        return "its output norm is another, or does not run what is patched here alone"
    return None


def _are_few(elements: int, like: Any) -> bool:
    """Whether hidden states of so many elements meet stock's operations, and stock's tensors do for them."""
    from wan_patches.ops.modulation import modulated_norm

    return elements < modulated_norm.least_for(like)


def reason_against_two_kinds(model: Any, block: str) -> str | None:
    """Why the blocks of `model` cannot be handed `TwoRows`; None where they can. block: the class they are to be of."""
    import torch

    from wan_patches.ops.tracing import is_transformed

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is being compiled"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if has_global_hooks():
        return "there are global module hooks"
    if is_transformed():
        return "a mode or a transform looks on"
    if not are_torchs(torch.cat):
        return "torch's functions are not its own"
    for module in model.blocks:
        if type(module).__name__ != block or not _is_patched(module, _OF_BLOCK):
            return "a block is another, or does not run what is patched here alone"
    return None


def _is_patched(module: Any, name: str) -> bool:
    """Whether a module runs what calls `name`, in one of its two forms."""
    return runs(module, name, name.replace(_PREFIX, _CLOSE))


def _reason_against_norm(norm: Any) -> str | None:
    """Why a norm has to be called as stock calls it; None where it can be asked about a few tokens at a time."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.normalization import FP32LayerNorm

    if not are_torchs(F.layer_norm, torch.layer_norm):
        return "torch's layer norm is not its own"
    if type(norm) is not FP32LayerNorm:
        return f"the norm is {type(norm).__name__}"
    if not is_untouched(norm):
        return "the norm has hooks, or a forward that is not diffusers'"
    if norm.weight is not None and torch.is_grad_enabled():
        return "gradients are enabled"
    return None
