"""Image to video with a stock pipeline, patched: `python examples/image_to_video.py MODEL IMAGE [PROMPT]`."""

from __future__ import annotations

import sys

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_gif, load_image

import wan_patches


def main(model: str, image: str, prompt: str = "", output: str = "video.gif", **call) -> None:
    """Generates a video with the patches on, and writes it."""
    print(wan_patches.enable())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanImageToVideoPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    frames = pipe(image=load_image(image), prompt=prompt, output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=16)


if __name__ == "__main__":
    main(*sys.argv[1:])
