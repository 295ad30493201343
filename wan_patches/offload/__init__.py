"""Offloading with one call: what fits the device, chosen from what the installed diffusers can do, and why.

    print(wan_patches.enable_offload(pipe, "npu", dry_run=True))  # estimates, and moves nothing
    wan_patches.enable_offload(pipe, "npu")
    video = pipe(...).frames
    wan_patches.disable_offload(pipe)

Four levels, each slower and smaller than the one before:

    none    everything lies on the device
    model   a model comes when it runs and goes when the next one does (`enable_model_cpu_offload`)
    group   denoisers come block by block, encoders layer by layer, decoders stay (group offloading)
    leaf    everything comes layer by layer

With a stream, the next block is copied while one computes, and two lie on the device. All of it is diffusers' own
offloading, with its own bits; `wan_patches.offload.streams` extends its streams to devices for which it makes none.
"""

from __future__ import annotations

from wan_patches.offload.apply import disable_offload, enable_offload
from wan_patches.offload.plan import BLOCKS, DEVICE, LEAVES, LEVELS, MODEL, Estimate, OffloadPlan, Placement

__all__ = [
    "BLOCKS",
    "DEVICE",
    "LEAVES",
    "LEVELS",
    "MODEL",
    "Estimate",
    "OffloadPlan",
    "Placement",
    "disable_offload",
    "enable_offload",
]
