"""Layouts: placements of a pipeline on the devices of a group of processes.

    inline, replicas   the whole pipeline on one device
    context            each device works on a part of every sequence, in diffusers' own parallel modes
    cfg                two devices, one per branch of classifier-free guidance
    sharded            each device holds a shard of the denoiser's weights and gathers them block by block (FSDP2)

In the last three, every rank of the group makes the same call with the same arguments, and rank 0 has the result.

A layout consists of a module of this package with a subclass of `Layout`, and an entry in the table `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from wan_patches.executor.layouts import vae
from wan_patches.executor.layouts.cfg import Cfg
from wan_patches.executor.layouts.context import Context
from wan_patches.executor.layouts.inline import Inline
from wan_patches.executor.layouts.placement import device_named, make_current
from wan_patches.executor.layouts.protocol import Layout, Parallel
from wan_patches.executor.layouts.replicas import Replicas
from wan_patches.executor.layouts.sharded import Sharded, loading_sharded

__all__ = ["LAYOUTS", "Layout", "Parallel", "device_named", "loading_sharded", "named", "place", "resolve"]

#: All layouts by name, in the order of messages.
LAYOUTS: dict[str, Layout] = {
    Inline.name: Inline(),
    Replicas.name: Replicas(),
    Context.name: Context(),
    Cfg.name: Cfg(),
    Sharded.name: Sharded(),
}


def named(name: str, auto: Layout | None = None) -> Layout:
    """Returns the layout of that name. If `auto` is given, the name "auto" stands for it.

    Raises:
        ValueError: there is no such layout; the message lists the known names.
    """
    known = LAYOUTS if auto is None else {"auto": auto, **LAYOUTS}
    if name not in known:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(known)}")
    return known[name]


def resolve(
    layout: str,
    devices: Sequence[torch.device],
    group_size: int | None,
    parallel: Parallel,
    vae_parallel: bool | str = False,
) -> tuple[Layout, int]:
    """Resolves an executor's options to the layout and the number of devices that work on a request together.

    Args:
        layout: a name of `LAYOUTS`, or "auto": "inline" for one device, "replicas" for several.
        devices: all devices of the executor.
        group_size, parallel, vae_parallel: as for `ParallelExecutor`.

    Raises:
        ValueError: the options do not fit together; the message names valid ones.
    """
    chosen = named(layout, auto=LAYOUTS[Inline.name if len(devices) == 1 else Replicas.name])
    if parallel is not None and not chosen.takes_parallel:
        takers = " or ".join(f'"{name}"' for name in _names(lambda each: each.takes_parallel))
        raise ValueError(f"parallel={parallel!r} is for layout={takers}, not {chosen.name!r}")
    _vae_mode(chosen, vae_parallel)
    if chosen.one_device and group_size not in (None, 1):
        raise _one_device(chosen, f"group_size={group_size}")
    return chosen, chosen.group_size(devices, group_size)


def place(
    pipe: Any,
    layout: str | Layout,
    device: torch.device,
    parallel: Parallel = None,
    vae_parallel: bool | str = False,
) -> None:
    """Places a pipeline on its device or devices. Call once in every rank of the group.

    With more than one rank, `torch.distributed` must be initialised, with this group as its world and a backend for
    `device.type`. Does not move pipelines that are offloaded, have a device map or are already on the device, nor parts
    quantised by bitsandbytes. "inline" and "replicas" leave objects without `to` unchanged.

    "sharded" and "cfg" compute in the same order as one device: the bits are equal wherever kernels are deterministic
    from call to call. The modes of "context" are diffusers' own: Ulysses runs the same kernels on fewer heads and
    tokens; ring and tensor parallelism sum in another order.

    Args:
        pipe: the pipeline.
        layout: a name of `LAYOUTS`, or a layout.
        device: device of this rank; becomes the current device.
        parallel: for "context": "ulysses" (default), "ring" or "tensor" over all ranks of the group, or a
            `ParallelConfig`, `ContextParallelConfig` or `TensorParallelConfig` of diffusers.
        vae_parallel: for "context", "cfg" and "sharded": True or "tiles", or "spatial", distributes the work of the
            VAE over all ranks of the group; see `wan_patches.parallelize_vae`. "tiles" turns tiling on.

    Raises:
        ValueError: the layout does not support the pipeline; the message states the reason.
        RuntimeError: the installed torch or diffusers is too old. With "cfg", calls of a pipeline that does not use
            guidance as expected raise it too, in both ranks.
    """
    layout = named(layout) if isinstance(layout, str) else layout
    if parallel is not None and not layout.takes_parallel:
        takers = " or ".join(map(repr, _names(lambda each: each.takes_parallel)))
        raise ValueError(f"`parallel` belongs to the layout {takers}, not to {layout.name!r}")
    mode = _vae_mode(layout, vae_parallel)
    if mode is not None:
        vae.check(pipe)
    layout.place(pipe, make_current(torch.device(device)), parallel)
    if mode is not None:
        vae.share(pipe, mode)


def _names(wanted: Callable[[Layout], bool]) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if wanted(layout)]


def _vae_mode(layout: Layout, vae_parallel: bool | str) -> str | None:
    mode = vae.mode_of(vae_parallel)
    if mode is not None and layout.one_device:
        raise _one_device(layout, f"vae_parallel={vae_parallel!r}")
    return mode


def _one_device(layout: Layout, option: str) -> ValueError:
    """Returns the error for an option of groups given to a layout without groups."""
    *others, last = _names(lambda each: not each.one_device)
    return ValueError(
        f"in layout {layout.name!r} one device works on a request; {option} is for {', '.join(others)} and {last}"
    )
