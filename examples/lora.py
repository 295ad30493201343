"""A LoRA beside the patches: `python examples/lora.py MODEL LORA PROMPT [VIDEO.gif]`.

LORA is a file, a folder, or a name on the Hub. Neither side needs to know of the other; the order does not matter.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import wan_patches


def main(model: str, lora: str, prompt: str, output: str = "video.gif", **call):
    """Generates a video with the LoRA and the patches on, writes it, and returns its frames."""
    wan_patches.enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    pipe.load_lora_weights(lora)
    frames = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=16)
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
