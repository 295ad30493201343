"""Layout "sharded": every device holds a part of the denoisers' weights and gathers them block by block (FSDP2).

The arithmetic is that of one device in the same order: the bits are the same wherever a kernel's are from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from wan_patches.executor.layouts.placement import denoisers_of, make_current, ranks_in_group
from wan_patches.executor.layouts.protocol import Layout, Parallel
from wan_patches.executor.sharding import is_sharded, make_mesh, shard, sharding_on_load
from wan_patches.pipelines.components import (
    has_hook,
    is_managed,
    is_quantized,
    is_quantized_by_bitsandbytes,
    modules,
)


class Sharded(Layout):
    """Weights divided among the ranks, from the reading of the checkpoint on where the executor loads it."""

    name = "sharded"

    def loading(self, device: torch.device) -> AbstractContextManager[None]:
        return loading_sharded(device)

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        _shard(pipe, denoisers_of(pipe, self.name), device, ranks_in_group(self.name))


@contextmanager
def loading_sharded(device: torch.device) -> Iterator[None]:
    """Divides the transformers and UNets that diffusers loads inside among the ranks, while they are read.

        with loading_sharded(device):
            pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16)
        place(pipe, "sharded", device)

    Without it, each rank has all weights in memory before `place` divides them. With it, a rank reads and holds only
    its rows of each parameter, from safetensors files in one or many parts, with the dtypes and values of stock; it
    does not matter whether the pipeline or the model's own `from_pretrained` loads. What else a pipeline has (text
    encoders, VAE) is loaded as usual, whole in every rank. A model that is quantised, has a device map, is stored in
    another format, or is made with `low_cpu_mem_usage=False` or without `accelerate` is loaded whole, and a warning of
    the logger "wan_patches" says why.

    On a CPU, stock leaves weights that keep their dtype in the mapped file, at any address, where kernels may round
    otherwise (by 3e-6 in a small float32 model); from weights in memory of their own come the same bits as here.

    This affects loading in all threads of the process. LoRA weights must be fused into a model that was loaded
    without it.

    Args:
        device: of this rank, as for `place`; `torch.distributed` must be initialised in the same way. All ranks load
            the same models in the same order.

    Raises:
        RuntimeError: torch has no FSDP2.
        ValueError: there are fewer than two ranks. Loading raises it for weights that are missing or have another
            shape; the message names them.
    """
    device, world = make_current(torch.device(device)), ranks_in_group(Sharded.name)
    with sharding_on_load(make_mesh(device, world), device):
        yield


def _shard(pipe: Any, denoisers: Sequence[nn.Module], device: torch.device, world: int) -> None:
    mesh = make_mesh(device, world)
    if is_managed(pipe):
        raise ValueError("layout 'sharded' cannot be combined with offloading or a device map: leave those out")
    whole = [denoiser for denoiser in denoisers if not is_sharded(denoiser)]  # the others were, when they were loaded
    for denoiser in whole:
        _check_shardable(denoiser)
    for denoiser in whole:
        shard(denoiser, mesh, device)

    denoising = set(map(id, denoisers))
    for module in modules(pipe).values():
        if id(module) not in denoising and not is_quantized_by_bitsandbytes(module):
            module.to(device)


def _check_shardable(denoiser: nn.Module) -> None:
    name = type(denoiser).__name__
    if is_quantized(denoiser):
        raise ValueError(f"layout 'sharded' cannot divide the packed weights of a quantised {name}")
    if has_hook(denoiser, "layerwise_casting"):
        raise ValueError(f"layout 'sharded' cannot divide the weights of a {name} under layerwise casting")
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(f"{name} has been loaded with a `parallel_config`: use layout 'context'")
