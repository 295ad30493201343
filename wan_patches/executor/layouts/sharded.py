"""Layout "sharded": each device holds a shard of the denoisers' weights and gathers them block by block (FSDP2).

The arithmetic has the same order as on one device: the bits are equal wherever kernels are deterministic from call to
call.
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
    """Shards weights over the ranks; during loading, if the executor loads the checkpoint."""

    name = "sharded"

    def loading(self, device: torch.device) -> AbstractContextManager[None]:
        return loading_sharded(device)

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        _shard(pipe, denoisers_of(pipe, self.name), device, ranks_in_group(self.name))


@contextmanager
def loading_sharded(device: torch.device) -> Iterator[None]:
    """Shards transformers and UNets over the ranks while diffusers loads them, inside the block.

        with loading_sharded(device):
            pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16)
        place(pipe, "sharded", device)

    Without this context manager, each rank holds all weights in memory until `place` shards them. With it, a rank reads
    and holds only its rows of each parameter, with the dtypes and values of stock. Weights must be in one or several
    safetensors files. The `from_pretrained` of the pipeline and of the model both work. Other components (text
    encoders, VAE) are loaded as usual, whole in every rank. A model is loaded whole, with a warning of the logger
    "wan_patches" that states the reason, if it is quantised, has a device map, is stored in another format, or is
    created with `low_cpu_mem_usage=False` or without `accelerate`.

    On a CPU, stock leaves weights that keep their dtype in the mapped file, at any alignment, where kernels may round
    differently (by 3e-6 in a small float32 model). Stock with weights in allocated memory gives the same bits as this.

    Affects loading in all threads of the process. LoRA weights must be fused into a model that was loaded without it.

    Args:
        device: device of this rank, as for `place`; `torch.distributed` must be initialised in the same way. All ranks
            must load the same models in the same order.

    Raises:
        RuntimeError: torch has no FSDP2.
        ValueError: there are fewer than two ranks. Loading also raises it for missing weights and weights of another
            shape; the message names them.
    """
    device, world = make_current(torch.device(device)), ranks_in_group(Sharded.name)
    with sharding_on_load(make_mesh(device, world), device):
        yield


def _shard(pipe: Any, denoisers: Sequence[nn.Module], device: torch.device, world: int) -> None:
    mesh = make_mesh(device, world)
    if is_managed(pipe):
        raise ValueError("layout 'sharded' cannot be combined with offloading or a device map: remove them")
    whole = [denoiser for denoiser in denoisers if not is_sharded(denoiser)]  # the others were sharded during loading
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
