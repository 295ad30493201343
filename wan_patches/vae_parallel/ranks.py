"""Communication between the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes that share the work of a VAE. Communication causes graph breaks in torch.compile.

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
        """Returns the values of all ranks, in rank order; for small values."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @torch.compiler.disable
    def fill(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Broadcasts the tensor of rank `source` to every rank; elsewhere `tensor` is the receive buffer."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, self._global(source), group=self.group)
        return tensor

    @torch.compiler.disable
    def edges(
        self, first: torch.Tensor, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the `last` of the previous rank and the `first` of the next rank.

        None for a missing neighbour, and for the previous rank if `last` is not given.
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
