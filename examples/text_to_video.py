"""Text to video with a stock pipeline, patched: `python examples/text_to_video.py MODEL PROMPT [VIDEO.gif]`."""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import wan_patches


def main(model: str, prompt: str, output: str = "video.gif", **call):
    """Generates a video with the patches on, writes it, and returns its frames."""
    wan_patches.enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    frames = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=16)
    print(wan_patches.status())  # what was active, what was left alone and why
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
