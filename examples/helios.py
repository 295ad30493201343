"""Helios, one resolution or a pyramid of them: `python examples/helios.py MODEL PROMPT [VIDEO.gif [IMAGE]]`.

MODEL says which pipeline it is; the distilled one takes two steps on each level and no guidance. With an image the
video starts there.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif, load_image

import wan_patches


def main(model: str, prompt: str, output: str = "video.gif", image: str | None = None, **call):
    """Generates a video with the patches on, writes it, and returns its frames."""
    wan_patches.enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    if pipe.config.get("is_distilled"):
        call = {"pyramid_num_inference_steps_list": [2, 2, 2], "guidance_scale": 1.0} | call
    if image is not None:
        call["image"] = load_image(image)
    frames = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=24)
    print(wan_patches.status())  # what was active, what was left alone and why
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
