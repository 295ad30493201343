"""Rotary embedding over interleaved pairs, as used by Wan, Helios and related models.

Pair `(x[2i], x[2i+1])` of every head is rotated by an angle that depends on its token and on `i`::

    y[2i]   = x[2i] * cos[i] - x[2i+1] * sin[i]
    y[2i+1] = x[2i] * sin[i] + x[2i+1] * cos[i]

Each product and each sum is rounded in the promoted dtype of `x` and the tables (no fused multiply-add), and the result
once more to the dtype of `x`, in stock's order of arithmetic.
"""

from __future__ import annotations

import functools

import torch

from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import ACCELERATOR, op
from wan_patches.ops.npu import rope as npu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRAIN = 32768  # at::internal::GRAIN_SIZE: elements below which ATen does not split an elementwise operation
_SMALL, _SMALL_IN_FP32 = 1 << 14, 1 << 15  # elements below which stock's operations are the fastest on CPUs
SMALL_ELSEWHERE = 1 << 12  # the same on GPUs; not measured yet
_CHUNK = 1 << 18  # complex numbers per thread and chunk: little scratch, and few parallel regions to synchronise
GRID = 65535  # blocks along the second axis of a launch
CHANNELS = 1 << 15  # of a token, processed by one block of a launch


@op("rotary embedding", autocasts=False)
def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of neighbouring channels.

    Args:
        x: queries or keys, `(batch, seq, heads, head_dim)`, any floating dtype and strides.
        cos, sin: one value per pair, broadcastable to `(batch, seq, heads, head_dim / 2)`; usually
            `(1 or batch, seq, 1, head_dim / 2)` in fp32.

    Returns:
        A new tensor like `x`.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


@op("rotary embedding of queries and keys", autocasts=False)
def apply_rotary_emb_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies `apply_rotary_emb` to queries and keys; a kernel for both takes one launch and reads the tables once.

    Args:
        query, key: as `x` of `apply_rotary_emb`.
        cos, sin: as in `apply_rotary_emb`.

    Returns:
        New tensors like `query` and `key`.
    """
    return apply_rotary_emb.reference(query, cos, sin), apply_rotary_emb.reference(key, cos, sin)


@apply_rotary_emb.trace
def stacked(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates without assignments, for compilers, autograd and devices where strided stores are slow."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    out = pairs.flatten(-2).type_as(x)
    # tables must not broadcast `x`; the reference raises the error
    return out if out.shape == x.shape else apply_rotary_emb.reference(x, cos, sin)


@apply_rotary_emb_qk.trace
def _each_traced(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return stacked(query, cos, sin), stacked(key, cos, sin)


@apply_rotary_emb.form(
    "complex product over whole rows", device="cpu", smallest=_SMALL, smallest_in_fp32=_SMALL_IN_FP32
)
def complex_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The CPU form: `multiply_rows`. Its refusal checks where that is exact."""
    return multiply_rows(x, cos, sin)


@complex_rows.refuses
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if (reason := why_no_rows(x, cos, sin)) is not None:
        return reason
    if {cos.dtype, sin.dtype} != {torch.float32}:
        return "the tables are not fp32"
    if not _is_exact(x.dtype, x.shape[2], x.shape[3], torch.get_num_threads()):
        return "no other form is exact for this dtype, this shape and this number of threads"
    return None


def multiply_rows(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype = torch.complex64
) -> torch.Tensor:
    """Multiplies pairs as complex numbers, a few tokens at a time.

    ATen's vector code for complex products rounds like the formula above, but its scalar code for the rest of a row may
    use fused multiply-adds. Therefore every thread gets whole rows of a multiple of 16 pairs (see `_step`). Rows of
    other lengths are computed with a few pairs more.

    Args:
        x: `(batch, seq, heads, head_dim)` on a CPU, any strides; `why_no_rows` returns None for it.
        cos, sin: `(1 or batch, seq, 1 or heads, head_dim / 2)`, any strides.
        dtype: the complex dtype of the products.

    Returns:
        A new tensor like `x`.
    """
    batch, seq, heads, dim = x.shape
    pairs, computed = dim // 2, _computed(dim)
    step = _step(seq, heads, computed, torch.get_num_threads())
    out = torch.empty_like(x)
    new = torch.empty if computed == pairs else torch.zeros
    table = new((step, cos.shape[2], computed), dtype=dtype, device="cpu")
    table_cos, table_sin = torch.view_as_real(table[..., :pairs]).unbind(-1)
    in_place = computed == pairs and _is_complex_view(x, dtype) and _is_complex_view(out, dtype)
    if not in_place:
        rows = new((step, heads, computed), dtype=dtype, device="cpu")
        scratch = torch.view_as_real(rows).flatten(-2)[..., :dim]
    for b in range(batch):
        x_b, out_b = x[b], out[b]
        cos_b, sin_b = cos[b if cos.shape[0] > 1 else 0], sin[b if sin.shape[0] > 1 else 0]
        if in_place:
            x_b = torch.view_as_complex(x_b.unflatten(-1, (-1, 2)))
            out_b = torch.view_as_complex(out_b.unflatten(-1, (-1, 2)))
        for start in range(0, seq, step):
            start = min(start, seq - step)  # the last chunk overlaps, so that all have the same size
            chunk = slice(start, start + step)
            table_cos.copy_(cos_b[chunk])
            table_sin.copy_(sin_b[chunk])
            if in_place:
                torch.mul(x_b[chunk], table, out=out_b[chunk])
            else:
                scratch.copy_(x_b[chunk])
                rows.mul_(table)
                out_b[chunk].copy_(scratch)
    return out


def why_no_rows(x: torch.Tensor, *tables: torch.Tensor) -> str | None:
    """Returns why `multiply_rows` does not support such queries or keys and such tables, or None."""
    if x.dim() != 4 or x.dtype not in DTYPES or x.shape[3] % 2:
        return "the head dimension is odd, or a dtype is another"
    if 3 * x.shape[3] < 4 * _computed(x.shape[3]):
        return "the head dimension is too far from a multiple of 32"
    batch, seq, heads, dim = x.shape
    if any(
        table.dim() != 4 or table.shape[0] not in (1, batch) or table.shape[1] != seq or table.shape[3] != dim // 2
        for table in tables
    ):
        return "the tables are not one for each token"
    if len({table.shape[2] for table in tables}) > 1 or tables[0].shape[2] not in (1, heads):
        return "the tables are not one for each token"
    step = _step(seq, heads, _computed(dim), torch.get_num_threads())
    return None if step > 0 else "a token is too large for one thread"


@apply_rotary_emb.form("npu_rotary_mul", device="npu")
def by_npu(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return npu.rotary_mul(x, cos, sin)


by_npu.refuses(npu.why_not)


@apply_rotary_emb.form("one kernel", device="cuda", smallest=SMALL_ELSEWHERE)
def by_kernel(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from wan_patches.ops.triton.rope import rotate

    return rotate(x, None, cos, sin)[0]


@apply_rotary_emb_qk.form("one kernel", device="cuda", smallest=SMALL_ELSEWHERE)
def both_by_kernel(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_patches.ops.triton.rope import rotate

    rotated, of_key = rotate(query, key, cos, sin)
    assert of_key is not None
    return rotated, of_key


@by_kernel.refuses
def why_no_kernel(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Returns why no kernel supports such queries or keys and such tables, or None."""
    if (reason := kernels.why_unusable(x.device)) is not None:
        return reason
    if x.dim() != 4 or x.dtype not in DTYPES or x.numel() == 0:
        return "the kernel is not for such queries and keys"
    batch, seq, heads, dim = x.shape
    if dim % 2 or batch > GRID or heads * dim > CHANNELS:
        return "the kernel is not for such queries and keys"
    fits = all(table.dtype == torch.float32 and table.device == x.device for table in (cos, sin)) and all(
        table.shape in ((1, seq, 1, dim // 2), (batch, seq, 1, dim // 2)) for table in (cos, sin)
    )
    return None if fits else "the tables are not one for each token, in fp32"


@both_by_kernel.refuses
def _(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if (key.shape, key.dtype, key.device) != (query.shape, query.dtype, query.device):
        return "queries and keys are not alike"
    return why_no_kernel(query, cos, sin)


@apply_rotary_emb_qk.form("each by itself", smallest=SMALL_ELSEWHERE)
def one_after_the_other(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return apply_rotary_emb(query, cos, sin), apply_rotary_emb(key, cos, sin)


by_stacking = apply_rotary_emb.form("stack + flatten", device=ACCELERATOR)(stacked)


def tokens_per_chunk(seq: int, pairs: int) -> int:
    """Returns the tokens, of `pairs` pairs each, that `multiply_rows` and its like compute at a time on CPUs."""
    return min(seq, max(1, torch.get_num_threads() * _CHUNK // pairs))


def _computed(dim: int) -> int:
    """Returns the pairs of a row that are computed, of which some may not exist: a multiple of 16."""
    return -(-dim // 32) * 16


@functools.lru_cache(maxsize=256)
def _step(seq: int, heads: int, half: int, threads: int) -> int:
    """Returns the tokens per chunk such that each thread gets whole rows (of one head and token); 0 if there is none.

    ATen gives each of `n = min(threads, ceil(numel / grain))` threads `ceil(numel / n)` elements.
    """
    token = heads * half
    alone = GRAIN // token  # ATen does not split so few tokens
    if seq <= alone or threads == 1:
        return min(seq, max(1, _CHUNK // token)) if threads == 1 else seq
    per_thread = -(-GRAIN // token)
    if seq >= per_thread * threads:  # enough for every thread, with a whole number of tokens each
        return threads * min(seq // threads, max(per_thread, _CHUNK // token))
    return alone


@functools.lru_cache(maxsize=64)
def _is_exact(dtype: torch.dtype, heads: int, dim: int, threads: int) -> bool:
    """Tests `complex_rows` on this processor against the plain formulation."""
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random state unchanged
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    token = heads * _computed(dim)
    for seq in {1, max(1, GRAIN // token), threads * -(-GRAIN // token) + 1}:
        if _step(seq, heads, _computed(dim), threads) > 0:
            x = random((1, seq, heads, dim)).to(dtype)
            cos, sin = random((2, 1, seq, 1, dim // 2))
            if not torch.equal(complex_rows(x, cos, sin), apply_rotary_emb.reference(x, cos, sin)):
                return False
    return True


def _is_complex_view(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether pairs of the last axis can be viewed as complex numbers of `dtype` in place."""
    strides = x.stride()
    return (
        x.dtype == dtype.to_real()
        and strides[-1] == 1
        and x.storage_offset() % 2 == 0
        and all(stride % 2 == 0 for stride in strides[:-1])
    )
