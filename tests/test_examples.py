"""Every example runs, in a tiny form."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import peft
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

import wan_patches
from wan_patches.bench.measure import identical
from wan_patches.testing.families import FAMILIES, images

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}


@pytest.fixture
def model(tmp_path, one_thread):
    """Saves a family's small pipeline; gives the folder."""

    def save(family: str) -> str:
        FAMILIES[family].build().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def made(path: Path, frames: list[PIL.Image.Image], stock: list[PIL.Image.Image]) -> None:
    """`path` is a video of `frames`, which are those of stock."""
    wan_patches.disable()
    with PIL.Image.open(path) as video:
        assert video.size == frames[0].size == (48, 32)
        assert video.n_frames == len(frames)
    assert identical(frames, stock)


def stock_video(model: str, prepare: Callable[[DiffusionPipeline], object] = lambda pipe: None, **call):
    """The frames that a saved pipeline gives without patches."""
    wan_patches.disable()
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    prepare(pipe)
    return pipe(generator=torch.Generator().manual_seed(0), output_type="pil", **call).frames[0]


def test_text_to_video(tmp_path, model, capsys):
    folder, output = model("wan_t2v"), tmp_path / "video.gif"
    frames = load("text_to_video").main(folder, "a fox", str(output), **TINY)
    assert re.search(r"^rope +[1-9]\d* of \d+ module", capsys.readouterr().out, re.MULTILINE)
    made(output, frames, stock_video(folder, prompt="a fox", **TINY))


@pytest.mark.parametrize("last", [False, True], ids=["first", "first and last"])
def test_image_to_video(tmp_path, model, last):
    folder, output = model("wan22_i2v"), tmp_path / "video.gif"
    first_last = images(0, 2, (64, 48))
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, path in zip(first_last, paths):
        image.save(path)
    more = {"last_image": first_last[1]} if last else {}
    frames = load("image_to_video").main(folder, paths[0], "a fox", str(output), paths[1] if last else None, **TINY)
    made(output, frames, stock_video(folder, prompt="a fox", image=first_last[0], **more, **TINY))


@pytest.mark.skipif(not FAMILIES["helios"].available, reason="this diffusers has no Helios")
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_helios(tmp_path, model, image):
    folder, output = model("helios"), tmp_path / "video.gif"
    (picture,) = images(0, 1, (64, 48))
    picture.save(tmp_path / "image.png")
    tiny = TINY | {"num_latent_frames_per_chunk": 2}
    more = {"image": picture} if image else {}
    path = str(tmp_path / "image.png") if image else None
    frames = load("helios").main(folder, "a fox", str(output), path, **tiny)
    made(output, frames, stock_video(folder, prompt="a fox", **more, **tiny))


@pytest.mark.parametrize(
    "family",
    ["wan_t2v", pytest.param("helios", marks=pytest.mark.skipif(not FAMILIES["helios"].available, reason="no Helios"))],
)
def test_stream(tmp_path, model, monkeypatch, family):
    folder, output = model(family), tmp_path / "video.mp4"
    more = {"num_latent_frames_per_chunk": 2} if family == "helios" else {}
    tiny = TINY | {"num_frames": 9} | more
    example, chunks = load("stream"), []
    write = example.Writer.__call__
    monkeypatch.setattr(example.Writer, "__call__", lambda self, chunk: (chunks.append(chunk), write(self, chunk)))
    example.main(folder, "a fox", str(output), **tiny)
    wan_patches.disable()
    assert [(chunk.start, chunk.reason) for chunk in chunks] == [(0, None), (1, None), (5, None)]
    frames = [image for chunk in chunks for image in chunk.frames[0]]
    assert identical(frames, stock_video(folder, prompt="a fox", **tiny))
    with av.open(str(output)) as file:
        video = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert np.shape(video) == (9, 32, 48, 3)
    # lossy: each is nearest to the one that it was
    apart = [[np.abs(np.subtract(written, frame, dtype=int)).mean() for frame in frames] for written in video]
    assert np.argmin(apart, axis=1).tolist() == [*range(9)]


def test_lora(tmp_path, model):
    folder, output, lora = model("wan_t2v"), tmp_path / "video.gif", str(tmp_path / "lora")
    write_lora(folder, lora)
    frames = load("lora").main(folder, lora, "a fox", str(output), **TINY)
    call = {"prompt": "a fox", **TINY}
    made(output, frames, stock_video(folder, lambda pipe: pipe.load_lora_weights(lora), **call))
    assert not identical(frames, stock_video(folder, **call))


def write_lora(model: str, folder: str) -> None:
    """A LoRA of a saved pipeline's attention, with weights that can be seen."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(folder, transformer_lora_layers=layers)


def test_compile(tmp_path, model):
    folder, output = model("wan22_i2v"), tmp_path / "video.gif"
    torch._dynamo.reset()
    (image,) = images(0, 1, (64, 48))
    frames = load("compile").main(folder, "a fox", str(output), "eager", image=image, **TINY)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    made(output, frames, stock_video(folder, prompt="a fox", image=image, **TINY))
    torch._dynamo.reset()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "devices",
    [["cpu"], pytest.param(["cpu", "cpu"], marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.slow)],
    ids=["inline", "workers", "ray"],
)
def test_batch(tmp_path, capsys, devices):
    FAMILIES["wan_t2v"].build().save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\na cat\n")
    videos = tmp_path / "videos"
    arguments = (str(tmp_path / "model"), str(prompts), str(videos), devices, torch.float32)
    assert load("batch").main(*arguments, **TINY) == 0
    assert sorted(path.name for path in videos.iterdir()) == ["0000.gif", "0002.gif"]
    out = capsys.readouterr().out
    assert "0002.gif: " in out
    assert "of which denoising" in out
    (videos / "0002.gif").unlink()
    assert load("batch").main(*arguments, **TINY | {"height": 33}) == 1
    assert "ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("context", ["--vae-parallel", "spatial"]),
        pytest.param("cfg", [], marks=pytest.mark.slow),
        pytest.param("sharded", ["--vae-parallel", "tiles"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("one_thread")
def test_spmd(tmp_path, layout, more):
    FAMILIES["wan_t2v"].build().save_pretrained(tmp_path / "model")
    output = tmp_path / "video.gif"
    tiny = ["--frames", "5", "--steps", "1", "--size", "48", "32", "--layout", layout, "--output", str(output)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "spmd.py"), str(tmp_path / "model"), *tiny, *more]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    with PIL.Image.open(output) as video:
        assert video.size == (48, 32)
        assert video.n_frames == 5
