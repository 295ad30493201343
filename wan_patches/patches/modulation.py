"""Transformer blocks of Wan, Helios, AnyFlow, Kandinsky and related models: adaLN modulation and gated residuals.

Includes Helios' modulations of history tokens and current tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wan_patches.patches.versions import since
from wan_patches.patching.fidelity import Fidelity
from wan_patches.patching.fingerprints import KANDINSKY_6, KANDINSKY_6_SR, relied_on
from wan_patches.patching.registry import Known, Patch, Target
from wan_patches.patching.rewrite import Block, Edit, Replace

_HERE = "wan_patches.bindings.modulation"
PREFIX, CLOSE_PREFIX = "_wan_patches_", "_wan_patches_close_"
_RESIDUAL_NORM = "_wan_patches_residual_norm"
NORM, _RESIDUAL, _CAST = "_wan_patches_modulated_norm", "_wan_patches_gated_residual", "_wan_patches_cast_norm"
_OF_MODEL, _OF_OUTPUT = "_wan_patches_segmented_modulation", "_wan_patches_current_row"
_SCALE_SHIFT, _GATE_SUM = "_wan_patches_scale_shift", "_wan_patches_gate_sum"
_TOKENS_FIRST, OF_BLOCK = "_wan_patches_tokens_first", "_wan_patches_modulations"


def _modulated(norm: str) -> Replace:
    return Replace(f"({norm}(X.float()) * (1 + SCALE) + SHIFT).type_as(X)", f"{NORM}({norm}, X, SCALE, SHIFT)")


_FEED_FORWARD = Replace("(X.float() + ff_output.float() * GATE).type_as(X)", f"{_RESIDUAL}(X, ff_output, GATE, True)")


def _block(x: str, *fingerprints: str) -> tuple[Edit, ...]:
    """Returns the edits for blocks in which a norm follows each residual sum.

    x: the blocks' name of the hidden states.
    """
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


def _apart(first: str, last: str, cross: str, casts: int) -> tuple[Edit, ...]:
    """Returns the edits for blocks in which no norm directly follows a residual sum.

    first, last: the modulated norms; `cross`: the norm before cross-attention, which occurs `casts` times.
    """
    return (
        _modulated(first),
        _modulated(last),
        Replace("(X.float() + attn_output * GATE).type_as(X)", f"{_RESIDUAL}(X, attn_output, GATE)"),
        Replace(f"{cross}(X.float()).type_as(X)", f"{_CAST}({cross}, X)", casts),
        _FEED_FORWARD,
    )


_ROW_PER_TOKEN = (  # of Wan 2.2 TI2V and Helios
    Replace("(TABLE.unsqueeze(0) + temb.float()).chunk(6, dim=2)", f"{OF_BLOCK}(TABLE, temb)"),
    Replace("MODULATION.squeeze(2)", "MODULATION", 6),
)
_ROWS_OF_FRAMES = (  # of AnyFlow: each token has the row of its frame
    Replace("(TABLE + temb.float()).chunk(6, dim=2)", f"{OF_BLOCK}(TABLE, temb)"),
    Replace("MODULATION.squeeze(2)", "MODULATION", 6),
)
_PLAIN_BLOCK = _block("hidden_states", "f057115c0857cb05", "0f474dcbbe6d0913")
_VACE_BLOCK = _block("control_hidden_states", "11672d88f6fc84c0", "a9ba2b4daf22ed6f")
_WAN_BLOCK = (*_PLAIN_BLOCK, *_ROW_PER_TOKEN)
_ANYFLOW_BLOCK = (*_PLAIN_BLOCK, *_ROWS_OF_FRAMES)
_HELIOS_BLOCK = (*_apart("self.norm1", "self.norm3", "self.norm2", 2), *_ROW_PER_TOKEN)
_ANIMATE_2_BLOCK = _apart("self.norm1", "self.norm2", "self.norm3", 1)


def _of_kandinsky_5(parts: int) -> tuple[Edit, ...]:
    """Returns the edits for blocks of `parts` parts, each with a modulated norm and a gated residual."""
    return (
        Replace(
            "(N(X.float()) * (SCALE.float() + 1.0) + SHIFT.float()).type_as(X)",
            f"{NORM}(N, X, SCALE.float(), SHIFT.float())",
            parts,
        ),
        Replace("(X.float() + GATE.float() * Y.float()).type_as(X)", f"{_RESIDUAL}(X, Y, GATE.float(), True)", parts),
    )


_OF_KANDINSKY_6 = "apply_scale_shift", "apply_gate_sum"


def _of_kandinsky_6(norms: int, residuals: int) -> tuple[Edit, ...]:
    """Returns the edits for calls of two functions, each of which a binding receives first."""
    modulate, add = _OF_KANDINSKY_6
    return (
        Replace(f"{modulate}(N(X.float()), X, SCALE, SHIFT)", f"{_SCALE_SHIFT}({modulate}, N, X, SCALE, SHIFT)", norms),
        Replace(f"{add}(X, Y, GATE)", f"{_GATE_SUM}({add}, X, Y, GATE)", residuals),
    )


_HELIOS_MODEL = (
    Replace(
        "torch.cat([timestep_proj_t0, timestep_proj], dim=2)", f"{_OF_MODEL}(self, timestep_proj_t0, timestep_proj)"
    ),
    Replace("timestep_proj.permute(0, 2, 1, 3)", f"{_TOKENS_FIRST}(timestep_proj)"),
    Replace("torch.cat([temb_t0, temb], dim=1)", f"{_OF_OUTPUT}(self, temb_t0, temb)"),
)


def _patch(module: str, *targets: Target, requires: tuple[Known, ...] = ()) -> Patch:
    return Patch(
        name="modulation",
        module=f"diffusers.models.transformers.{module}",
        targets=targets,
        calls={name: f"{_HERE}:{name.removeprefix(PREFIX)}" for name in _CALLS},
        implementations={
            "CPUs": "a few tokens at a time",
            "CUDA with Triton": "one kernel for a residual sum, its norm in ATen's order and the modulation",
            "compilers, autograd": "stock's operations",
        },
        requires=requires,
        since=since(module),
    )


def _close(patch: Patch) -> Patch:
    """Returns the same patch with single-pass norms: the same edits with calls of the close functions."""
    targets = tuple(replace(target, edits=tuple(map(_renamed, target.edits))) for target in patch.targets)
    calls = {name.replace(PREFIX, CLOSE_PREFIX): path for name, path in patch.calls.items()}
    for name in (NORM, _CAST, _RESIDUAL_NORM, _SCALE_SHIFT):
        calls[name.replace(PREFIX, CLOSE_PREFIX)] = f"{_HERE}:close_{name.removeprefix(PREFIX)}"
    implementations = {
        **patch.implementations,
        "CUDA with Triton": "one kernel for a residual sum, its norm in any order and the modulation",
        "NPUs": "npu_layer_norm_eval for norms without modulation",
    }
    return replace(patch, fidelity=Fidelity.CLOSE, targets=targets, calls=calls, implementations=implementations)


def _renamed(edit: Any) -> Any:
    return replace(edit, replacement=edit.replacement.replace(PREFIX, CLOSE_PREFIX))


_CALLS = (
    *(NORM, _RESIDUAL, _CAST, _RESIDUAL_NORM, _SCALE_SHIFT, _GATE_SUM),
    *(_OF_MODEL, _TOKENS_FIRST, _OF_OUTPUT, OF_BLOCK),
)
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
    _patch(
        "transformer_anyflow",
        Target("AnyFlowTransformerBlock.forward", _ANYFLOW_BLOCK),
        Target("AnyFlowTransformer3DModel.forward", _OUTPUT),
    ),
    _patch(
        "transformer_anyflow_far",
        Target("AnyFlowTransformerBlock.forward", _ANYFLOW_BLOCK),
        Target("AnyFlowFARTransformer3DModel._forward_inference", _OUTPUT),
        Target("AnyFlowFARTransformer3DModel._forward_train", _OUTPUT),
    ),
    _patch(
        "transformer_wan_animate_2",
        Target("WanAnimate2TransformerBlock.forward", _ANIMATE_2_BLOCK),
        Target("Head.forward", (_modulated("self.norm"),)),
    ),
    _patch(
        "transformer_kandinsky",
        Target("Kandinsky5TransformerEncoderBlock.forward", _of_kandinsky_5(2)),
        Target("Kandinsky5TransformerDecoderBlock.forward", _of_kandinsky_5(3)),
    ),
    _patch(
        "transformer_kandinsky6",
        Target("Kandinsky6TransformerEncoderBlock.forward", _of_kandinsky_6(2, 2)),
        Target("Kandinsky6FusedTransformerDecoderBlock.forward", _of_kandinsky_6(8, 9)),
        requires=relied_on(KANDINSKY_6, *_OF_KANDINSKY_6),
    ),
    _patch(
        "transformer_kandinsky6_sr",
        Target("Kandinsky6SRTransformerBlock.forward", _of_kandinsky_6(2, 2)),
        requires=relied_on(KANDINSKY_6_SR, *_OF_KANDINSKY_6),
    ),
)
PATCHES = (*_EXACT, *map(_close, _EXACT))
