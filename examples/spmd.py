"""One video on all devices of a machine, without an executor: `torchrun --nproc-per-node 2 examples/spmd.py MODEL`.

Every process runs this script (SPMD). The layouts are the executor's: "context", "cfg" and "sharded".
"""

from __future__ import annotations

import argparse
import contextlib
import os

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import wan_patches
from wan_patches.executor.layouts import loading_sharded, place


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompt", default="A red fox runs over fresh snow")
    parser.add_argument("--layout", default="context", choices=["context", "cfg", "sharded"])
    parser.add_argument("--vae-parallel", choices=["tiles", "spatial"], help="share the video autoencoder's work too")
    parser.add_argument("--output", default="video.gif")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    options = parser.parse_args()

    rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    wan_patches.enable()
    # "sharded": no process ever has all weights, as each reads its own part only
    with loading_sharded(device) if options.layout == "sharded" else contextlib.nullcontext():
        pipe = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    place(pipe, options.layout, device, vae_parallel=options.vae_parallel or False)
    video = pipe(
        prompt=options.prompt,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        width=options.size[0],
        height=options.size[1],
        generator=torch.Generator().manual_seed(0),  # every rank must start from the same noise
        output_type="pil",
    ).frames[0]
    if rank == 0:
        export_to_gif(video, options.output, fps=16)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
