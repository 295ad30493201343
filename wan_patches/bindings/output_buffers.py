"""Where finished frames go, for one who wants them elsewhere than in new memory and `PIL.Image.fromarray`.

A worker process has the frames of a pipeline computed straight into shared memory, and leaves making images
to the process that receives them:

    with delivering(Delivery(empty_strided=shared_memory, image=lazy_image)):
        result = pipe(**arguments, output_type="pil")

Only the "frames" patch asks (`wan_patches.patches.frames`), and only where it is in force: where stock's own code
makes the frames (another dtype, another number of channels, patches off), they come as stock makes them.
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
class Delivery:
    """How finished frames leave a pipeline.

    empty_strided: makes the CPU tensor that a result is written to, from its shape, its strides in elements and
        its dtype; called once per result, or chunk of one. What it raises, the pipeline call raises.
    image: what `output_type="pil"` gives for one frame, a uint8 array `(height, width, channels)`, which lies
        in memory that `empty_strided` gave.
    """

    empty_strided: Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]
    image: Callable[[np.ndarray], PIL.Image.Image]


#: Where finished frames go; None: to new memory, as in stock.
delivery: ContextVar[Delivery | None] = ContextVar("wan_patches.bindings.output_buffers", default=None)


@contextlib.contextmanager
def delivering(to: Delivery) -> Iterator[None]:
    """Frames finished inside the block, in this thread or task, leave as `to` says."""
    token = delivery.set(to)
    try:
        yield
    finally:
        delivery.reset(token)
