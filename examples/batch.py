"""Many videos on all devices: `python examples/batch.py MODEL PROMPTS.txt [FOLDER [ray]]`, a prompt on each line.

Writes `FOLDER/0000.gif` and so on as they are done, with a bar for each video in the works. One that fails is told
at the end and hinders no other; start again to make those that are missing. With `ray` the devices are those of the
Ray cluster that this machine is a part of.
"""

from __future__ import annotations

import concurrent.futures
import sys
from pathlib import Path

import torch
from diffusers.utils import export_to_gif

import wan_patches
from wan_patches import ParallelExecutor, RayParallelExecutor


def main(model: str, prompts: str, folder: str = "videos", devices="auto", dtype=torch.bfloat16, **call) -> int:
    """Makes the videos that are not in `folder` yet; returns how many could not be made."""
    out = Path(folder)
    out.mkdir(exist_ok=True)
    jobs = {
        out / f"{number:04}.gif": dict(prompt=prompt, generator=torch.Generator().manual_seed(number), **call)
        for number, prompt in enumerate(Path(prompts).read_text().splitlines())
        if prompt.strip()
    }
    failed = 0
    wan_patches.enable()  # in the workers too
    kind, devices = (RayParallelExecutor, "auto") if devices == "ray" else (ParallelExecutor, devices)
    with kind.from_pretrained(model, devices=devices, retries=1, progress=True, torch_dtype=dtype) as ex:
        futures = {ex.submit(output_type="pil", **job): path for path, job in jobs.items() if not path.exists()}
        for future in concurrent.futures.as_completed(futures):
            path = futures.pop(future)
            try:
                output = future.result()
            except Exception as error:
                failed += 1
                print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            export_to_gif(output.frames[0], str(path), fps=16)
            print(f"{path}: {sum(output.timings.values()):.1f} s, of which denoising {output.timings['denoise']:.1f} s")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
