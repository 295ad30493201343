"""The protocol of a layout: what the executor's own process asks of it, and what every rank of a group does."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

if TYPE_CHECKING:
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

#: The executor's argument `parallel`: a mode by name, or a configuration of diffusers; None is the layout's default.
Parallel: TypeAlias = "str | ParallelConfig | ContextParallelConfig | TensorParallelConfig | None"


class Layout(ABC):
    """How a pipeline lies on the devices of its group of processes.

    The executor's process reads the attributes and calls `group_size`; then each rank of a group, in a process of its
    own, calls `loading` and `place` once. A layout keeps nothing between calls, and pickles.

    Attributes:
        name: as in `ParallelExecutor(layout=...)`.
        in_process: the pipeline lives in the executor's process, on one device, without workers.
        one_device: a single device works on a request; otherwise all ranks of a group make the same call with the same
            arguments, and rank 0 has the result.
        takes_parallel: the executor's argument `parallel` means something here.
    """

    name: ClassVar[str]
    in_process: ClassVar[bool] = False
    one_device: ClassVar[bool] = False
    takes_parallel: ClassVar[bool] = False

    def group_size(self, devices: Sequence[torch.device], wanted: int | None) -> int:
        """Returns how many of the executor's devices work on a request together.

        Args:
            devices: all devices of the executor, at least one.
            wanted: the executor's argument `group_size`; None for the default, which is all devices.

        Raises:
            ValueError: the devices cannot be divided into such groups.
        """
        if self.one_device:
            return 1
        size = wanted or len(devices)
        if size < 2 or len(devices) % size:
            raise ValueError(
                f"layout {self.name!r} wants groups of {max(size, 2)} devices, and there are {len(devices)}"
            )
        return size

    def loading(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which `from_pretrained` makes the pipeline; by default nothing changes in it."""
        return contextlib.nullcontext()

    @abstractmethod
    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        """Puts the pipeline on this rank's device, or its part there, and prepares calls that all ranks make together.

        Args:
            pipe: a pipeline, or for layouts of one device any callable.
            device: of this rank, with its index; it is the current one.
            parallel: None unless the layout takes it.

        Raises:
            ValueError: the pipeline or the group does not fit the layout.
            RuntimeError: the installed torch or diffusers is too old.
        """
