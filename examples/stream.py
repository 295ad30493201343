"""Writes a video while it is decoded: `python examples/stream.py MODEL PROMPT [VIDEO.mp4]`.

The whole video is never in memory. Needs PyAV: `pip install "wan-patches[demo]"`.
"""

from __future__ import annotations

import sys

import av
import torch
from diffusers import DiffusionPipeline

import wan_patches


class Writer:
    """An MP4 file that frames are added to; what there is when it is closed can be played."""

    def __init__(self, path: str, fps: int = 16) -> None:
        self._file, self._fps, self._stream = av.open(path, "w"), fps, None

    def __call__(self, chunk) -> None:
        """The frames of a `wan_patches.pipelines.streaming.Chunk`: here of one video, as PIL images."""
        for image in chunk.frames[0]:
            if self._stream is None:
                self._stream = self._file.add_stream("libx264", rate=self._fps)
                self._stream.width, self._stream.height = image.size
                self._stream.pix_fmt = "yuv420p"
            self._file.mux(self._stream.encode(av.VideoFrame.from_image(image)))
        if chunk.reason:  # this pipeline's frames cannot be had earlier
            print(f"written when all was decoded: {chunk.reason}")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._file.mux(self._stream.encode())  # what the encoder still has
        self._file.close()


def main(model: str, prompt: str, output: str = "video.mp4", **call) -> None:
    """Generates a video with the patches on, and writes each chunk of frames when it has been decoded."""
    wan_patches.enable()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    with Writer(output) as write:
        # with an executor: executor.submit(on_frames=lambda request, chunk: write(chunk), prompt=prompt, ...)
        wan_patches.stream_frames(pipe, write, prompt=prompt, generator=generator, output_type="pil", **call)


if __name__ == "__main__":
    main(*sys.argv[1:])
