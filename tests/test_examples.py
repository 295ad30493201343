"""Every example runs, in a tiny form."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

from wan_patches import ParallelExecutor
from wan_patches.bench.models import FAMILIES, images

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_image_to_video(tmp_path, capsys):
    FAMILIES["wan22_i2v"].build().save_pretrained(tmp_path / "model")
    images(0, 1, (64, 48))[0].save(tmp_path / "image.png")
    tiny = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
    output = tmp_path / "video.gif"
    load("image_to_video").main(str(tmp_path / "model"), str(tmp_path / "image.png"), "a fox", str(output), **tiny)
    assert "WanImageToVideoPipeline" in capsys.readouterr().out
    with PIL.Image.open(output) as video:
        assert video.size == (48, 32)
        assert video.n_frames == 5


TINY = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]], ids=["inline", "workers"])
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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.timeout(120)
def test_service():
    service = load("service")

    async def ask(port: int, prompt: str) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST / HTTP/1.1\r\nContent-Length: {len(prompt)}\r\n\r\n{prompt}".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return head, body

    async def main() -> None:
        with ParallelExecutor(FAMILIES["wan_t2v"].build, devices="cpu") as executor:
            server = await service.serve(executor, 0, **TINY)
            port = server.sockets[0].getsockname()[1]
            (head, fox), (_, cat) = await asyncio.gather(ask(port, "a fox"), ask(port, "a cat"))
            assert head.startswith(b"HTTP/1.1 200 OK")
            for body in (fox, cat):
                with PIL.Image.open(io.BytesIO(body)) as video:
                    assert video.size == (48, 32)
            server.close()

            submitted = []
            submit = executor.submit
            executor.submit = lambda **request: submitted.append(submit(**request)) or submitted[-1]
            slow = await service.serve(executor, 0, **TINY | {"num_inference_steps": 900})
            port = slow.sockets[0].getsockname()[1]
            with contextlib.suppress(asyncio.TimeoutError):  # hangs up
                await asyncio.wait_for(ask(port, "a long story"), 1.0)
            while not submitted or not submitted[0].done():
                await asyncio.sleep(0.05)
            assert submitted[0].cancelled()
            slow.close()

            broken = await service.serve(executor, 0, **TINY | {"height": 33})
            head, body = await ask(broken.sockets[0].getsockname()[1], "a fox")
            assert head.startswith(b"HTTP/1.1 500")
            assert b"ValueError" in body
            broken.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("layout", "more"),
    [("context", ["--vae-parallel", "spatial"]), ("cfg", []), ("sharded", ["--vae-parallel", "tiles"])],
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
