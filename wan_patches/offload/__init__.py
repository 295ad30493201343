"""Offloads a pipeline with one call: chooses the fastest level of diffusers' offloading that fits the device.

    print(wan_patches.enable_offload(pipe, "npu", dry_run=True))  # only estimates
    wan_patches.enable_offload(pipe, "npu")
    video = pipe(...).frames
    wan_patches.disable_offload(pipe)

Each level is slower and needs less memory than the one before:

    none    all weights stay on the device
    model   one model at a time is on the device (`enable_model_cpu_offload`)
    group   denoisers are loaded block by block, encoders layer by layer; decoders stay (group offloading)
    leaf    all models are loaded layer by layer

With a stream, the next block is copied while the current one computes, so two blocks are on the device. Everything is
diffusers' own offloading and bit-identical; `wan_patches.offload.streams` makes its streams available on more devices.
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
