"""What a block moves between its products and attention: the tensors that kernels and ATen's calls touch, counted."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import wan_patches

pytestmark = pytest.mark.upstream

HEAD_DIM, SEQ, TEXT = 128, 1000, 8
SHAPES = {"14b": (40, 13824), "ti2v-5b": (24, 14336)}  # heads, and channels within the feed-forward layer
KERNELS = {
    "layer_norm": ("_layer_norm",),
    "modulation": ("_modulate", "_gated_residual", "_add_and_cast"),
    "rms_norm": ("_rms_norm_rope",),
    "rope": ("_kernel",),
}
PRODUCTS = ("mm", "addmm", "bmm", "linear", "scaled_dot_product")


class Traffic(TorchDispatchMode):
    """Collects name and bytes of each kernel, which touches each of its tensors once; views are no kernels.

    Products and attention are left out: their results are any memory.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.paused = [], False

    def add(self, name, tensors):
        held = {}
        for tensor in tensors:
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]  # not of expanded axes
            held[tensor.data_ptr(), tensor.dtype] = torch.Size(sizes).numel() * tensor.element_size()
        self.kernels.append((name, sum(held.values())))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        if name.startswith(PRODUCTS):
            shapes = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs or {}))
            result = function(*shapes[0], **shapes[1])
            return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), result)
        result = function(*args, **(kwargs or {}))
        of_results = [part.alias_info for part in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in of_results)
        if not (self.paused or is_view or name.startswith("empty")):
            self.add(name, [part for part in tree_leaves((args, kwargs, result)) if isinstance(part, torch.Tensor)])
        return result


class OneRmsNorm(TorchFunctionMode):
    """Torch's RMS norm is one kernel on GPUs (from 2.9 on), and several on CPUs."""

    def __init__(self, traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.rms_norm:
            return function(*args, **(kwargs or {}))
        self.traffic.paused = True
        result = function(*args, **(kwargs or {}))
        self.traffic.paused = False
        self.traffic.add("rms_norm", (args[0], result))
        return result


@pytest.fixture
def forward(as_on_cuda, monkeypatch):
    """Runs a block and returns its kernels, and their bytes for each element of the hidden states.

    Kernels of Triton are only recorded: what they would write stays as it is.
    """
    pytest.importorskip("triton")
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    def run(shape):
        heads, inner = SHAPES[shape]
        dim, traffic = heads * HEAD_DIM, Traffic()
        with torch.device("meta"):
            block = WanTransformerBlock(dim, inner, heads, cross_attn_norm=True).eval().bfloat16()
        block.to_empty(device="cpu")  # memory that nothing reads
        tokens, text = torch.randn(1, SEQ, dim).bfloat16(), torch.randn(1, TEXT, dim).bfloat16()
        temb = torch.randn(1, SEQ, 6, dim).bfloat16() if shape == "ti2v-5b" else torch.randn(1, 6, dim)
        tables = tuple(torch.randn(2, 1, SEQ, 1, HEAD_DIM))
        for module, names in KERNELS.items():
            library = importlib.import_module(f"wan_patches.ops.triton.{module}")
            for name in names:

                def launch(*args, called=f"{module}.{name}", **options):
                    traffic.add(called, [value for value in args if isinstance(value, torch.Tensor)])

                monkeypatch.setattr(library, name, defaultdict(lambda launch=launch: launch))
        with torch.no_grad(), traffic, OneRmsNorm(traffic):
            block(tokens, text, temb, tables)
        of_tokens = [(name, size) for name, size in traffic.kernels if size > SEQ * dim]  # not of rows and text
        return Counter(name for name, _ in of_tokens), sum(size for _, size in of_tokens) / (SEQ * dim)

    for module in ("ops.dispatch", "ops.tracing", "bindings.modulation"):  # nothing looks on but the count
        monkeypatch.setattr(importlib.import_module(f"wan_patches.{module}"), "is_transformed", lambda: False)
    return run


@pytest.mark.parametrize(
    ("shape", "version", "most"), [("14b", "2.9.0", 50), ("14b", "2.8.0", 57), ("ti2v-5b", "2.9.0", 70)]
)
def test_block_moves_few_bytes_between_products(shape, version, most, forward, monkeypatch):
    """RMS norms of torch before 2.9 are several kernels, but counted as one."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    _, stock = forward(shape)
    with wan_patches.enabled(["rope", "qk", "modulation"], gate=False):
        kernels, ours = forward(shape)
    of_attention = {"2.9.0": {"rms_norm._rms_norm_rope": 2, "rms_norm": 1}, "2.8.0": {"rope._kernel": 1, "rms_norm": 3}}
    others = {"layer_norm._layer_norm": 3, "modulation._gated_residual": 1, "gelu": 1}
    assert kernels == {**others, **of_attention[version]}
    assert ours <= most
    assert stock > 4 * ours
