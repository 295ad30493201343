"""adaLN modulation, gated residuals and the casts around them: the operations between the matmuls of a block.

    modulated norm:   (norm(x.float()) * (1 + scale) + shift).type_as(x)
    gated residual:   (x.float() + y * gate).type_as(x)
    residual norm:    h = x + y or a gated residual, and the norm of h, modulated or not

Every operation is rounded in fp32, and the result once more to the dtype of `x`, in stock's order of arithmetic. `norm`
is ATen's layer norm; it processes each token separately and returns new memory. Results have the strides of stock's
results, whatever the strides of the arguments.

Hidden states are `(batch, seq, dim)`. A scale, a shift or a gate is fp32 and `(1 or batch, rows, dim)`: one row for all
tokens, a row per token, `SegmentedModulation`, or `RowPerToken`, which is a row per token that has not been computed
yet.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from wan_patches.ops import proof
from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import ACCELERATOR, op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# elements from which CPU forms take at most 0.9 of stock's time: `wan-patches bench forms`
_SMALL, _SMALL_IN_FP32 = 1 << 21, 1 << 22
SMALL_ELSEWHERE = 1 << 14  # the same on accelerators; not measured yet
SLOW = "stock's operations are the fastest in fp32, where channels do not lie next to each other"
_VECTOR = 16  # bytes that ATen's norm loads at once
_CHUNK = 1 << 19  # elements processed at a time on CPUs: they stay in the cache from the first operation to the last


class LayerNorm(Protocol):
    """A layer norm over the last axis, in fp32, which returns new memory."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class SegmentedModulation(NamedTuple):
    """A modulation with one row for each of two kinds of tokens.

    A type of its own, because a dense tensor with a row per token cannot prove that it has only two distinct rows.
    Models pass it on like the tensor `(1 or batch, seq, ...)` that it represents. Stock code gets that tensor from
    `float`, if a patch is removed during a run.

    rows: `(1 or batch, 2, ...)`: the row of the tokens before `split_index`, and that of the others. The rest is
        `(dim,)`, or `(n, dim)` for `n` modulations in one.
    split_index, seq: numbers of tokens.
    """

    rows: torch.Tensor
    split_index: int
    seq: int

    @property
    def ndim(self) -> int:
        """Number of axes of the represented tensor."""
        return self.rows.dim()

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> SegmentedModulation:
        """Unflattens the represented tensor; `dim` is at least 2."""
        return self._replace(rows=self.rows.unflatten(dim, sizes))

    def to(self, device: torch.device, non_blocking: bool = False) -> SegmentedModulation:
        """Moves to a device, as offloading hooks request of tensors."""
        return self._replace(rows=self.rows.to(device, non_blocking=non_blocking))

    def added_to(self, table: torch.Tensor) -> tuple[SegmentedModulation, ...]:
        """Returns the `n` modulations in this one, after adding `table`, `(1, n, dim)`, to each row."""
        return tuple(self._replace(rows=rows) for rows in (table.unsqueeze(0) + self.rows).unbind(dim=2))

    def float(self) -> torch.Tensor:
        """Returns the represented tensor in fp32."""
        return self.dense().float()

    def dense(self) -> torch.Tensor:
        """Returns the represented tensor, `(1 or batch, seq, ...)`."""
        batch, _, *rest = self.rows.shape
        counts = (self.split_index, self.seq - self.split_index)
        return torch.cat([row.expand(batch, n, *rest) for row, n in zip(self.rows.split(1, dim=1), counts)], dim=1)


class SegmentedTimesteps(NamedTuple):
    """A timestep for each token, with two distinct values.

    values: `(2,)`: the timestep of the tokens before `split_index`, and that of the others.
    split_index: a number of tokens.
    shape: `(batch, seq)`, of the represented tensor, which stock code gets from `flatten`.
    """

    values: torch.Tensor
    split_index: int
    shape: tuple[int, int]

    @property
    def ndim(self) -> int:
        """Number of axes of the represented tensor."""
        return 2

    def to(self, device: torch.device, non_blocking: bool = False) -> SegmentedTimesteps:
        """Moves to a device, as offloading hooks request of tensors."""
        return self._replace(values=self.values.to(device, non_blocking=non_blocking))

    def flatten(self) -> torch.Tensor:
        """Returns the represented tensor, flattened: `(batch * seq,)`."""
        batch, seq = self.shape
        first, rest = self.values.split(1)
        return torch.cat((first.expand(self.split_index), rest.expand(seq - self.split_index))).repeat(batch)


class RowPerToken(NamedTuple):
    """A row for each token, computed where it is used: all rows in fp32 can be larger than the model.

    table: `(1, 1, dim)`; temb: `(batch, seq, dim)`. Their sum in fp32 is the modulation.
    """

    table: torch.Tensor
    temb: torch.Tensor

    def dense(self) -> torch.Tensor:
        """Returns the modulation, `(batch, seq, dim)`."""
        return self.table + self.temb.float()


Modulation = torch.Tensor | SegmentedModulation | RowPerToken


@op("modulated norm")
def modulated_norm(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """Returns the norm of `x` in fp32, scaled and shifted; a new tensor like `x`."""
    return (norm(x.float()) * (1 + as_tensor(scale)) + as_tensor(shift)).type_as(x)


@op("gated residual")
def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """Returns `x` plus `y` times `gate`; a new tensor like `x`.

    y: the output of attention or of the feed-forward layer, with the shape of `x`.
    cast: whether stock casts `y` to fp32 explicitly, which makes a difference only in fp64.
    """
    return (x.float() + (y.float() if cast else y) * as_tensor(gate)).type_as(x)


@op("cast norm")
def cast_norm(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Returns the norm of `x` in fp32, a new tensor like `x`."""
    return norm(x.float()).type_as(x)


@op("residual norm")
def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the residual sum of `x` and `y`, and its norm.

    Args:
        x, y: as in `gated_residual`.
        gate: None for `x + y`, in their dtypes.
        norm, scale, shift: as in `modulated_norm`; None for `norm` alone.

    Returns:
        The sum and the norm, new tensors like `x`.
    """
    h = x + y if gate is None else gated_residual.reference(x, y, gate)
    if scale is None or shift is None:
        return h, cast_norm.reference(h, norm)
    return h, modulated_norm.reference(h, norm, scale, shift)


def as_tensor(modulation: Modulation) -> torch.Tensor:
    """Returns a modulation as stock's tensor: `(1 or batch, 1 or seq, dim)`."""
    return modulation if isinstance(modulation, torch.Tensor) else modulation.dense()


# CPUs: a few tokens at a time

_IN_CHUNKS = "a few tokens at a time"


@modulated_norm.form(_IN_CHUNKS, device="cpu", smallest=_SMALL, smallest_in_fp32=_SMALL_IN_FP32)
def modulated_norm_in_chunks(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    x = in_rows(x)
    out = torch.empty_like(x)
    for b, chunk in _chunks(x, scale, shift):
        normed = norm(x[b, chunk].float())
        out[b, chunk].copy_(normed.mul_(1 + _rows(scale, b, chunk)).add_(_rows(shift, b, chunk)))
    return out


@gated_residual.form(_IN_CHUNKS, device="cpu", smallest=3 << 20, smallest_in_fp32=1 << 23)
def gated_residual_in_chunks(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    like, x, y = _sum_like(x, y, gate), in_rows(x), in_rows(y)
    out = torch.empty_like(x)
    for b, chunk in _chunks(x, gate):
        product = y[b, chunk] * _rows(gate, b, chunk)
        out[b, chunk].copy_(product.add_(x[b, chunk]))
    return laid_out(out, like)


@cast_norm.form(_IN_CHUNKS, device="cpu", smallest=1 << 22)
def cast_norm_in_chunks(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    x = in_rows(x)
    out = torch.empty_like(x)
    for b, chunk in _chunks(x):
        out[b, chunk].copy_(norm(x[b, chunk].float()))
    return out


@residual_norm.form(_IN_CHUNKS, device="cpu", smallest=_SMALL, smallest_in_fp32=6_000_000)
def residual_norm_in_chunks(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    like, x, y = _sum_like(x, y, gate), in_rows(x), in_rows(y)
    h, out = torch.empty_like(x), torch.empty_like(x)
    for b, chunk in _chunks(x, gate, scale, shift):
        if gate is None:
            torch.add(x[b, chunk], y[b, chunk], out=h[b, chunk])
        else:
            product = y[b, chunk] * _rows(gate, b, chunk)
            h[b, chunk].copy_(product.add_(x[b, chunk]))
        normed = norm(h[b, chunk].float())
        if scale is not None and shift is not None:
            normed.mul_(1 + _rows(scale, b, chunk)).add_(_rows(shift, b, chunk))
        out[b, chunk].copy_(normed)
    return laid_out(h, like), out


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`, contiguous: `(batch, seq, dim)`."""
    if x.is_contiguous():
        return x.as_strided(x.shape, _contiguous_strides(x.shape))  # strides of axes of size one are arbitrary
    return torch.stack([sample.contiguous() for sample in x])  # ATen copies two axes in blocks


def laid_out(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Returns the contiguous `x` in other strides."""
    if x.stride() == strides:
        return x
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    for sample, rows in zip(out, x):
        if sample.stride(0) < sample.stride(1):
            sample, rows = sample.t(), rows.t()
        sample.copy_(rows)
    return out


def _sum_like(x: torch.Tensor, y: torch.Tensor, gate: Modulation | None) -> tuple[int, ...]:
    """Returns the strides of the residual sum in stock."""
    if x.is_contiguous() and y.is_contiguous():
        return _contiguous_strides(x.shape)
    return _strides_of_sum(x.shape, x.stride(), x.dtype, y.stride(), y.dtype, gate is not None)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    _, seq, dim = shape
    return seq * dim, dim, 1


@functools.lru_cache(maxsize=256)
def _strides_of_sum(
    shape: torch.Size,
    x_strides: tuple[int, ...],
    x_dtype: torch.dtype,
    y_strides: tuple[int, ...],
    y_dtype: torch.dtype,
    is_gated: bool,
) -> tuple[int, ...]:
    """Queries torch with meta tensors; plain sums in fp32, because meta tensors in bf16 give wrong strides."""
    dtypes = (x_dtype, y_dtype) if is_gated else (torch.float32, torch.float32)
    x, y = (
        torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        for strides, dtype in zip((x_strides, y_strides), dtypes)
    )
    gate = torch.empty((1, 1, shape[-1]), device="meta")
    return (gated_residual.reference(x, y, gate) if is_gated else x + y).stride()


def _chunks(x: torch.Tensor, *modulations: Modulation | None) -> Iterator[tuple[int, slice]]:
    """Yields a sample of the batch and a slice of its tokens, all of one kind."""
    batch, seq, dim = x.shape
    borders = {modulation.split_index for modulation in modulations if isinstance(modulation, SegmentedModulation)}
    edges = sorted({0, seq, *borders})
    step = max(1, _CHUNK // dim)
    for b in range(batch):
        for begin, end in itertools.pairwise(edges):
            for start in range(begin, end, step):
                yield b, slice(start, min(start + step, end))


def _rows(modulation: Modulation, b: int, chunk: slice) -> torch.Tensor:
    """Returns a modulation's rows for a chunk of `_chunks`: `(1 or tokens, dim)`."""
    if isinstance(modulation, SegmentedModulation):
        of_sample = modulation.rows[b if modulation.rows.shape[0] > 1 else 0]
        return of_sample[:1] if chunk.start < modulation.split_index else of_sample[1:]
    if isinstance(modulation, RowPerToken):
        return modulation.table[0] + modulation.temb[b, chunk].float()
    of_sample = modulation[b if modulation.shape[0] > 1 else 0]
    return of_sample if of_sample.shape[0] == 1 else of_sample[chunk]


# Accelerators

_IN_ONE = "one kernel, in the order of ATen's norm"
_IN_PLACE = "in place"
_KERNEL = "one kernel after the norm"


@modulated_norm.form(_IN_ONE, device="cuda", smallest=SMALL_ELSEWHERE)
def modulated_norm_in_one(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.layer_norm import layer_norm_modulate

    rows = of_kernel(scale), of_kernel(shift)
    return layer_norm_modulate(x, norm.weight, norm.bias, *rows, norm.eps, border_of(scale))


@cast_norm.form(_IN_ONE, device="cuda", smallest=SMALL_ELSEWHERE)
def cast_norm_in_one(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    from wan_patches.ops.triton.layer_norm import layer_norm_modulate

    return layer_norm_modulate(x, norm.weight, norm.bias, None, None, norm.eps)


@residual_norm.form(_IN_ONE, device="cuda", smallest=SMALL_ELSEWHERE)
def residual_norm_in_one(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_patches.ops.triton.layer_norm import residual_layer_norm_modulate

    modulations = (gate, scale, shift)
    by, factor, term = (None if modulation is None else of_kernel(modulation) for modulation in modulations)
    border = next((border_of(modulation) for modulation in modulations if modulation is not None), None)
    return residual_layer_norm_modulate(x, y, by, norm.weight, norm.bias, factor, term, norm.eps, border)


@modulated_norm.form(_KERNEL, device="cuda", smallest=SMALL_ELSEWHERE)
def modulated_norm_kernel(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import modulate

    return modulate(norm(x.float()), of_kernel(scale), of_kernel(shift), x.dtype, border_of(scale))


@gated_residual.form("one kernel", device="cuda", smallest=SMALL_ELSEWHERE)
def gated_residual_kernel(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import gated_residual

    return gated_residual(x, y, of_kernel(gate), border_of(gate))


@residual_norm.form("a kernel before the norm, and one after it", device="cuda", smallest=SMALL_ELSEWHERE)
def residual_norm_kernels(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_patches.ops.triton.modulation import add_and_cast, modulate

    if gate is None and x.dtype != torch.float32:
        h, wide = add_and_cast(x, y)
    else:
        h = x + y if gate is None else gated_residual_kernel(x, y, gate)
        wide = h.float()
    normed = norm(wide)
    if scale is None or shift is None:
        return h, normed.type_as(x)
    return h, modulate(normed, of_kernel(scale), of_kernel(shift), x.dtype, border_of(scale))


@modulated_norm.form(_IN_PLACE, device=ACCELERATOR, smallest=SMALL_ELSEWHERE)
def modulated_norm_in_place(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    normed = norm(x.float())
    for tokens, rows in _kinds_of_tokens(scale):
        normed[:, tokens].mul_(1 + rows)
    for tokens, rows in _kinds_of_tokens(shift):
        normed[:, tokens].add_(rows)
    return normed.type_as(x)


@gated_residual.form(_IN_PLACE, device=ACCELERATOR, smallest=SMALL_ELSEWHERE)
def gated_residual_in_place(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    total = torch.empty_strided(x.shape, _sum_like(x, y, gate), dtype=torch.float32, device=x.device)
    for tokens, rows in _kinds_of_tokens(gate):
        torch.mul(y[:, tokens], rows, out=total[:, tokens])
    return total.add_(x).type_as(x)


@residual_norm.form(_IN_PLACE, device=ACCELERATOR, smallest=SMALL_ELSEWHERE)
def residual_norm_in_place(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + y if gate is None else gated_residual_in_place(x, y, gate)
    if scale is None or shift is None:
        return h, cast_norm.reference(h, norm)
    return h, modulated_norm_in_place(h, norm, scale, shift)


def _kinds_of_tokens(modulation: Modulation) -> Iterator[tuple[slice, torch.Tensor]]:
    if isinstance(modulation, SegmentedModulation):
        yield slice(modulation.split_index), modulation.rows[:, :1]
        yield slice(modulation.split_index, None), modulation.rows[:, 1:]
    else:
        yield slice(None), as_rows(modulation)


def of_kernel(modulation: Modulation) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns a modulation as EXACT kernels expect it: they make a row for each token where they use it."""
    return (modulation.table, modulation.temb) if isinstance(modulation, RowPerToken) else as_rows(modulation)


def as_rows(modulation: Modulation) -> torch.Tensor:
    """Returns a modulation's rows."""
    if isinstance(modulation, SegmentedModulation):
        return modulation.rows
    return modulation.dense() if isinstance(modulation, RowPerToken) else modulation


def border_of(modulation: Modulation) -> int | None:
    """Returns the number of tokens with the first of two rows, or None if there are not two rows."""
    return modulation.split_index if isinstance(modulation, SegmentedModulation) else None


# When forms apply


def why_not(x: torch.Tensor, *modulations: Modulation | None) -> str | None:
    """Returns why the forms do not support `x` and its modulations, or None."""
    given = [modulation for modulation in modulations if modulation is not None]
    if x.dim() != 3 or x.dtype not in DTYPES or x.is_meta or x.numel() == 0:
        return "the hidden states are not (batch, seq, dim) in fp32, bf16 or fp16"
    if not all(_fits(modulation, x) for modulation in given) or len(set(map(border_of, given))) > 1:
        return "the modulation is not in fp32, or does not fit"
    return None


def why_not_sum(x: torch.Tensor, y: torch.Tensor, gate: Modulation | None) -> str | None:
    """Returns why the forms cannot add `y` to `x`, or None."""
    fits = y.shape == x.shape and y.dtype in DTYPES and y.device == x.device
    return None if fits and (gate is not None or y.dtype == x.dtype) else "what is added does not fit"


def why_strided(*hidden_states: torch.Tensor) -> str | None:
    """Returns why kernels that write hidden states do not support these, or None."""
    return None if all(x.is_contiguous() for x in hidden_states) else "the hidden states are not contiguous"


def _why_not_in_one(x: torch.Tensor, norm: LayerNorm, *modulations: Modulation | None) -> str | None:
    """Returns why ATen's norm of `x` in fp32 is not the one whose order the kernel has, or None."""
    if (reason := kernels.why_unusable(x.device) or why_not(x, *modulations) or why_strided(x)) is not None:
        return reason
    if torch.version.hip is not None:
        return "ATen's norm has another order on AMD's GPUs"
    from wan_patches.ops.triton.layer_norm import HAS_GATHER, MAX_DIM, TILE

    if not HAS_GATHER:
        return "Triton is older than 3.3"
    dim = x.shape[-1]
    if dim % TILE or dim > MAX_DIM:
        return f"the width is not a multiple of {TILE}, up to {MAX_DIM}"
    parameters = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    if any(tensor.dtype not in DTYPES or tensor.shape != (dim,) or tensor.device != x.device for tensor in parameters):
        return "the weights do not fit"
    if not all(tensor.is_contiguous() for tensor in parameters) or norm.eps < torch.finfo(torch.float32).tiny:
        return "the weights do not fit"
    if any(tensor.dtype == torch.float32 and tensor.data_ptr() % _VECTOR for tensor in (x, *parameters)):
        return "ATen takes another norm for what lies unaligned in memory"
    return None


def _has_its_order(x: torch.Tensor, norm: LayerNorm) -> bool:
    """Whether the kernel has the bits of `norm` in fp32: in half dtypes most differences are rounded away."""
    from wan_patches.ops.triton.layer_norm import layer_norm_modulate

    rows = proof.rows_that_tell_orders(x.shape[2], x.device)
    return torch.equal(layer_norm_modulate(rows, norm.weight, norm.bias, None, None, norm.eps), norm(rows))


modulated_norm_in_one.confirms(lambda x, norm, *modulations: _has_its_order(x, norm))
cast_norm_in_one.confirms(_has_its_order)
residual_norm_in_one.confirms(lambda x, y, gate, norm, *modulations: _has_its_order(x, norm))


@modulated_norm_in_one.refuses
def _(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> str | None:
    return _why_not_in_one(x, norm, scale, shift)


@cast_norm_in_one.refuses
def _(x: torch.Tensor, norm: LayerNorm) -> str | None:
    return "in fp32 there is nothing to cast" if x.dtype == torch.float32 else _why_not_in_one(x, norm)


@residual_norm_in_one.refuses
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> str | None:
    return _why_not_in_one(x, norm, gate, scale, shift) or why_not_sum(x, y, gate) or why_strided(y)


@modulated_norm_kernel.refuses
def _(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> str | None:
    return kernels.why_unusable(x.device) or why_not(x, scale, shift)


@modulated_norm_in_chunks.refuses
def _(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> str | None:
    if (reason := why_not(x, scale, shift)) is not None:
        return reason
    return SLOW if x.dtype == torch.float32 and x.stride(2) != 1 and isinstance(scale, torch.Tensor) else None


@modulated_norm_in_place.refuses
def _(x: torch.Tensor, norm: LayerNorm, scale: Modulation, shift: Modulation) -> str | None:
    return why_not(x, scale, shift)


@gated_residual_kernel.refuses
def _(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> str | None:
    return kernels.why_unusable(x.device) or why_not(x, gate) or why_not_sum(x, y, gate) or why_strided(x, y)


@gated_residual_in_chunks.refuses
def _(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> str | None:
    if (reason := why_not(x, gate) or why_not_sum(x, y, gate)) is not None:
        return reason
    return SLOW if x.dtype == torch.float32 and (x.stride(2), y.stride(2)) != (1, 1) else None


@gated_residual_in_place.refuses
def _(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> str | None:
    return why_not(x, gate) or why_not_sum(x, y, gate)


@cast_norm_in_chunks.refuses
def _(x: torch.Tensor, norm: LayerNorm) -> str | None:
    return "in fp32 there is nothing to cast" if x.dtype == torch.float32 else why_not(x)


@residual_norm_kernels.refuses
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> str | None:
    fits = why_not(x, gate, scale, shift) or why_not_sum(x, y, gate) or why_strided(x, y)
    return kernels.why_unusable(x.device) or fits


@residual_norm_in_chunks.refuses
@residual_norm_in_place.refuses
def _(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: LayerNorm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> str | None:
    return why_not(x, gate, scale, shift) or why_not_sum(x, y, gate)


def _fits(modulation: Modulation, x: torch.Tensor) -> bool:
    batch, seq, dim = x.shape
    if any(part.device != x.device or part.dim() != 3 or part.stride(-1) != 1 for part in _parts(modulation)):
        return False
    if isinstance(modulation, RowPerToken):
        table, temb = modulation
        return table.shape == (1, 1, dim) and temb.shape == x.shape and {table.dtype, temb.dtype} <= set(DTYPES)
    known: tuple[int, ...] = (1, seq)
    if isinstance(modulation, SegmentedModulation):
        known = (2,) if modulation.seq == seq else ()
        modulation = modulation.rows
    return (
        modulation.dtype == torch.float32
        and modulation.shape[0] in (1, batch)
        and modulation.shape[1] in known
        and modulation.shape[2] == dim
    )


def _parts(modulation: Modulation) -> tuple[torch.Tensor, ...]:
    """Returns the tensors that a modulation consists of."""
    if isinstance(modulation, SegmentedModulation):
        return (modulation.rows,)
    return tuple(modulation) if isinstance(modulation, RowPerToken) else (modulation,)
