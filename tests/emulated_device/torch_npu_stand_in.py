"""A stand-in for torch_npu and mindiesd: their documented arithmetic and limits in plain torch, on any device.

Not those packages, and no evidence of how they round or how fast they are. Where the documentation states a limit, the
stand-in raises. Signatures are those of `wan_patches/ops/npu/schemas.json`; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)

#: Tokens below which MindIE-SD has no laser attention.
LASER_TOKENS = 2048


def _demand(condition: bool, limit: str) -> None:
    if not condition:
        raise RuntimeError(f"stand-in for torch_npu: {limit}")


# torch_npu


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    _demand(rotary_mode in ("half", "interleave"), "rotary_mode is 'half' or 'interleave'")
    _demand(rotary_mode == "interleave" and rotate is None, "only what is used here is made")
    for tensor in (input, r1, r2):
        _demand(tensor.dim() == 4, "four dimensions")
        _demand(tensor.dtype in FLOATING, "float16, bfloat16 or float32")
        _demand(tensor.device == input.device, "one device")
        _demand(tensor.dtype == input.dtype, "what becomes of mixed dtypes is not documented")
    batch, seq, heads, dim = input.shape
    _demand(batch * heads < 1000, "batch * heads < 1000")
    _demand(dim < 896 and dim % 2 == 0, "an even head_dim < 896")
    _demand(r1.shape == r2.shape == (1, seq, 1, dim), "tables of shape 1S1D")
    rotated = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    return (input * r1 + rotated * r2).contiguous()


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    _demand(input.dtype in FLOATING, "float16, bfloat16 or float32")
    _demand(gamma.dtype == input.dtype, "gamma has the dtype of the input")
    _demand(gamma.device == input.device, "one device")
    _demand(2 <= input.dim() <= 8, "two to eight dimensions")
    _demand(gamma.shape == input.shape[-gamma.dim() :], "gamma has the last dimensions of the input")
    axes = tuple(range(-gamma.dim(), 0))
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    _demand(input.dtype in FLOATING, "float16, bfloat16 or float32")
    _demand(tuple(normalized_shape) == input.shape[-len(normalized_shape) :], "the last dimensions of the input")
    for tensor in (weight, bias):
        _demand(tensor is None or tensor.dtype == input.dtype, "weight and bias have the dtype of the input")
        _demand(tensor is None or tensor.device == input.device, "one device")
    weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return F.layer_norm(input.float(), list(normalized_shape), weight, bias, eps).to(input.dtype)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    _demand(input_layout in ("BSND", "BNSD"), "only what is used here is made")
    _demand(all(t is None for t in (pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)), "as above")
    _demand(keep_prob == 1.0 and sparse_mode == 0, "as above")
    for tensor in (query, key, value):
        _demand(tensor.dim() == 4, "four dimensions")
        _demand(tensor.dtype in FLOATING and tensor.dtype == query.dtype, "one dtype: float16, bfloat16 or float32")
        _demand(tensor.device == query.device, "one device")
        _demand(tensor.shape[2 if input_layout == "BSND" else 1] == head_num, "head_num heads")
    if input_layout == "BSND":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if atten_mask is not None:  # true: left out
        _demand(atten_mask.dtype in (torch.bool, torch.uint8), "a mask of bool or uint8")
        _demand(atten_mask.shape[-2:] == scores.shape[-2:], "a mask of all scores")
        scores = scores.masked_fill(atten_mask.bool(), -torch.inf)
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    if input_layout == "BSND":
        out = out.transpose(1, 2).contiguous()
    statistics = scores.amax(-1, keepdim=True).expand(*scores.shape[:-1], 8)
    return out, statistics, statistics, query.new_empty(0), 0, 0, 0


# mindiesd


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    fused: bool = True,
    head_first: bool = False,
    **kwargs: str,
) -> Tensor:
    _demand(kwargs.keys() <= {"opt_mode", "op_type", "layout"}, "no other options")
    _demand(kwargs.get("opt_mode") == "manual", "only what is used here is made")
    _demand(kwargs.get("op_type") == "ascend_laser_attention" and kwargs.get("layout") == "BNSD", "as above")
    _demand(fused and not head_first and attn_mask is None, "as above")
    _demand(scale is None or isinstance(scale, float), "scale is a float")
    for tensor in (query, key, value):
        _demand(tensor.dim() == 4, "four dimensions")
        _demand(tensor.dtype in HALF and tensor.dtype == query.dtype, "one dtype: float16 or bfloat16")
        _demand(not (tensor.requires_grad and torch.is_grad_enabled()), "no backward")
    _demand(query.shape[-1] <= 128, "head_dim <= 128")
    _demand(min(query.shape[1], key.shape[1]) >= LASER_TOKENS, "laser attention is for long sequences")
    half = [tensor.transpose(1, 2).half().float() for tensor in (query, key, value)]
    scores = half[0] @ half[1].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ half[2]).half().to(query.dtype)
    return out.transpose(1, 2)
