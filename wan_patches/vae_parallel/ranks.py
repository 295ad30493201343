"""What the ranks of a group exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes that share the work of a VAE. Compilers break their graphs where those exchange something.

    group: the process group; None is all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("a parallel VAE needs torch.distributed: call init_process_group in every rank")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @torch.compiler.disable
    def tell(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank; for small values."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @torch.compiler.disable
    def fill(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Returns the tensor of rank `source` in every rank; in the others, `tensor` is a buffer for it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self._global(source), group=self.group)
        return tensor

    @torch.compiler.disable
    def edges(
        self, first: torch.Tensor, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the `last` of the rank before and the `first` of the rank after.

        None at the ends, and in the place of the rank before if `last` is not given.
        """
        above = below = None
        todo = []
        for neighbour, sent in ((self.rank - 1, first), (self.rank + 1, last)):
            if not 0 <= neighbour < self.size:
                continue
            if sent is not None:
                todo.append(self._operation(dist.isend, sent.contiguous(), neighbour))
            if neighbour > self.rank:
                below = torch.empty_like(first, memory_format=torch.contiguous_format)
                todo.append(self._operation(dist.irecv, below, neighbour))
            elif last is not None:
                above = torch.empty_like(last, memory_format=torch.contiguous_format)
                todo.append(self._operation(dist.irecv, above, neighbour))
        for work in dist.batch_isend_irecv(todo) if todo else ():
            work.wait()
        return above, below

    def _operation(self, kind: Callable[..., Any], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, self._global(peer), self.group)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
