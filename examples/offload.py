"""A video from a model that is larger than the device: `python examples/offload.py MODEL PROMPT [VIDEO.gif]`.

Prints what is chosen, why, and what every choice would need before anything is moved.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from wan_patches import disable_offload, enable_offload


def main(model, prompt, output="video.gif", device=None, dtype=torch.bfloat16, dry_run=False, level="auto", **call):
    """Plans, and unless `dry_run`, makes the video and puts the pipeline back."""
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    print(enable_offload(pipe, device, level=level, dry_run=dry_run))
    if dry_run:
        return
    video = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]
    export_to_gif(video, output, fps=16)
    disable_offload(pipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
