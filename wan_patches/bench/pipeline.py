"""Benchmarks a whole pipeline from noise to frames, without the text encoder, in every variant against the floor.

Prompts are embeddings. The denoiser and the autoencoder have the published sizes and random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor

from wan_patches.bench import variants
from wan_patches.bench.measure import generator, name_of, using_threads
from wan_patches.bench.shapes import TEXT_TOKENS, Shape, build
from wan_patches.testing.families import images, unipc


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    regional: bool = False,
    seconds: float = 10.0,
    steps: int = 4,
    vae_dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> variants.Result:
    """Measures the pipeline of a shape with `steps` denoising steps; see `variants.measure`.

    vae_dtype: of the autoencoder; by default that of the denoiser.

    The compiled variants compile the denoiser or, with `regional`, its blocks, which share one graph.
    """
    with using_threads(threads):
        pipe, arguments = build_pipeline(shape, device, dtype, steps=steps, vae_dtype=vae_dtype)

        def make() -> variants.Call:
            return lambda: pipe(**arguments()).frames

        subject = variants.Subject(make, variants.compilable(pipe.transformer, regional))
        more: dict[str, Any] = {"compiled": compiled, "regional": regional, "seconds": seconds, "steps": steps}
        found = variants.measure("pipeline", shape, subject, device, dtype, **more)
        return replace(found, vae_dtype=None if vae_dtype is None else name_of(vae_dtype))


def build_pipeline(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    steps: int,
    vae_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Returns the pipeline and a function that returns new arguments for a call.

    The pipeline is text to video, or image to video for TI2V. See `measure` for the other arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae: Any = diffusers.AutoencoderKLWan(**shape.vae)
    torch.nn.Module.to(vae.eval(), device, vae_dtype or dtype)  # diffusers' own `to` warns about unnamed modules
    transformer = build(shape, device, dtype, seed)
    common = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer}
    pipe: Any
    takes: dict[str, Any] = {"num_frames": shape.frames, "height": shape.height, "width": shape.width}
    if shape.is_helios:
        scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
        pipe = diffusers.HeliosPipeline(**common, scheduler=scheduler)
        takes["num_latent_frames_per_chunk"] = shape.latents[0]
    elif shape.per_token:
        pipe = diffusers.WanImageToVideoPipeline(**common, scheduler=unipc(), expand_timesteps=True)
        takes["image"] = images(seed, 1, (shape.width, shape.height))[0]
    else:
        pipe = diffusers.WanPipeline(**common, scheduler=unipc(5.0 if shape.height >= 720 else 3.0))
    pipe.set_progress_bar_config(disable=True)
    drawing = generator(device, seed)
    size = (1, TEXT_TOKENS, transformer.config.text_dim)
    texts = [randn_tensor(size, generator=drawing, device=device, dtype=dtype) for _ in range(2)]
    takes |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "num_inference_steps": steps}

    def arguments() -> dict[str, Any]:
        return {**takes, "generator": generator(device, seed), "output_type": "np"}

    return pipe, arguments
