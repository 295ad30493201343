"""The interface of layouts, for the executor's process and for the ranks of a group."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

if TYPE_CHECKING:
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

#: The executor's argument `parallel`: name of a mode, or a configuration of diffusers; None for the layout's default.
Parallel: TypeAlias = "str | ParallelConfig | ContextParallelConfig | TensorParallelConfig | None"


class Layout(ABC):
    """Base class of layouts, which place a pipeline on the devices of a group of processes.

    The executor's process reads the attributes and calls `group_size`; then each rank of a group, in its own process,
    calls `loading` and `place` once. A layout is stateless and can be pickled.

    Attributes:
        name: value of `ParallelExecutor(layout=...)`.
        in_process: whether the pipeline runs in the executor's process, on one device, without workers.
        one_device: whether a single device works on a request; otherwise, all ranks of a group make the same call with
            the same arguments, and rank 0 has the result.
        takes_parallel: whether the layout uses the executor's argument `parallel`.
    """

    name: ClassVar[str]
    in_process: ClassVar[bool] = False
    one_device: ClassVar[bool] = False
    takes_parallel: ClassVar[bool] = False

    def group_size(self, devices: Sequence[torch.device], wanted: int | None) -> int:
        """Returns the number of devices that work on a request together.

        Args:
            devices: all devices of the executor, at least one.
            wanted: the executor's argument `group_size`; None for the default, all devices.

        Raises:
            ValueError: the devices cannot be divided into such groups.
        """
        if self.one_device:
            return 1
        size = wanted or len(devices)
        if size < 2 or len(devices) % size:
            raise ValueError(
                f"layout {self.name!r} needs groups of {max(size, 2)} devices, and there are {len(devices)}"
            )
        return size

    def loading(self, device: torch.device) -> AbstractContextManager[None]:
        """Returns a context manager that wraps `from_pretrained`; by default it does nothing."""
        return contextlib.nullcontext()

    @abstractmethod
    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        """Places the pipeline, or this rank's part of it, on the device, and prepares calls by all ranks together.

        Args:
            pipe: a pipeline; for layouts of one device, any callable.
            device: device of this rank, with its index; already the current device.
            parallel: None unless the layout takes it.

        Raises:
            ValueError: the layout does not support the pipeline or the group.
            RuntimeError: the installed torch or diffusers is too old.
        """
