"""Image to video, patched: `python examples/image_to_video.py MODEL IMAGE [PROMPT [VIDEO.gif [LAST_IMAGE]]]`.

With a last image the video ends there (Wan 2.1 FLF2V, Wan 2.2 I2V A14B).
"""

from __future__ import annotations

import sys

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_gif, load_image

import wan_patches


def main(model: str, image: str, prompt: str = "", output: str = "video.gif", last_image: str | None = None, **call):
    """Generates a video with the patches on, writes it, and returns its frames."""
    wan_patches.enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanImageToVideoPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    if last_image is not None:
        call["last_image"] = load_image(last_image)
    generator = torch.Generator().manual_seed(0)
    frames = pipe(image=load_image(image), prompt=prompt, generator=generator, output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=16)
    print(wan_patches.status())  # what was active, what was left alone and why
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
