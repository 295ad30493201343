"""A small video service over one executor: `python examples/service.py MODEL [PORT]`.

    curl -X POST --data-binary "a fox in the snow" localhost:8000/ > fox.gif

The body is the prompt, the answer the video. Who hangs up before it is there has it cancelled, and the device works
for the next one. Meant to be read: a real service has queues with limits, authentication and a proper HTTP server.
"""

from __future__ import annotations

import asyncio
import functools
import io
import sys

import torch

import wan_patches
from wan_patches import ParallelExecutor


def to_gif(frames) -> bytes:
    """PIL images as an animated GIF."""
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // 16, loop=0)
    return file.getvalue()


async def answer(executor: ParallelExecutor, call: dict, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    """One connection, one video."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        prompt = (await reader.readexactly(length)).decode()
        # the event loop goes on while the video is made
        video = asyncio.wrap_future(executor.submit(prompt=prompt, output_type="pil", **call))
        gone = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([video, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not video.done():
            video.cancel()  # at the pipeline's next step
            return
        try:
            status, body = "200 OK\r\nContent-Type: image/gif", to_gif(video.result().frames[0])
        except Exception as error:
            status, body = "500 Internal Server Error", f"{type(error).__name__}: {error}\n".encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        pass  # no request, or nobody there any more
    finally:
        writer.close()


async def serve(executor: ParallelExecutor, port: int = 8000, **call) -> asyncio.Server:
    """Answers requests on `port` (0: any) with `executor`; `call` goes to the pipeline with every prompt."""
    return await asyncio.start_server(functools.partial(answer, executor, call), "127.0.0.1", port)


async def main(model: str, port: str = "8000") -> None:
    wan_patches.enable()
    with ParallelExecutor.from_pretrained(model, timeout=600, torch_dtype=torch.bfloat16) as executor:
        async with await serve(executor, int(port)) as server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
