"""The patches under torch.compile: `python examples/compile.py MODEL PROMPT [VIDEO.gif [BACKEND]]`.

Only the blocks are compiled, which all have the same code: one graph, and a start in seconds instead of minutes.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import wan_patches


def main(model: str, prompt: str, output: str = "video.gif", backend: str = "inductor", **call):
    """Generates a video with compiled denoisers and the patches on, writes it, and returns its frames."""
    wan_patches.enable()  # before the first compiled call, so that there is one graph and not two
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    for name in ("transformer", "transformer_2"):  # Wan 2.2 A14B has two
        if (denoiser := getattr(pipe, name, None)) is not None:
            denoiser.compile_repeated_blocks(fullgraph=True, backend=backend)
    frames = pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]
    export_to_gif(frames, output, fps=16)
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
