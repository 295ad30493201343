"""Lets a caller choose the memory that finished frames are written to, and how images are made from them.

By default frames go to newly allocated memory and `PIL.Image.fromarray`. A worker process instead has the frames
computed directly into shared memory, and leaves making images to the receiving process:

    with writing_to(OutputBuffers(empty_strided=shared_memory, image=lazy_image)):
        result = pipe(**arguments, output_type="pil")

Only the "frames" patch (`wan_patches.patches.frames`) supports this, and only while it is active. When stock code makes
the frames (another dtype, another number of channels, patches disabled), they are delivered as in stock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch


@dataclass(frozen=True)
class OutputBuffers:
    """How finished frames leave a pipeline.

    empty_strided: allocates the CPU tensor for a result from its shape, its strides in elements and its dtype; called
        once per result, or per chunk of one. Its exceptions propagate from the pipeline call.
    image: makes the `output_type="pil"` result for one frame, a uint8 array `(height, width, channels)` in memory that
        `empty_strided` allocated.
    """

    empty_strided: Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]
    image: Callable[[np.ndarray], PIL.Image.Image]


#: How finished frames are delivered; None: in newly allocated memory, as in stock.
output_buffers: ContextVar[OutputBuffers | None] = ContextVar("wan_patches.bindings.output_buffers", default=None)


@contextlib.contextmanager
def writing_to(to: OutputBuffers) -> Iterator[None]:
    """Delivers the frames finished inside the block, in this thread or task, as `to` specifies."""
    token = output_buffers.set(to)
    try:
        yield
    finally:
        output_buffers.reset(token)
