"""Ranks: the processes of a group that work on a request together, independent of the transport of messages."""

from __future__ import annotations

import contextlib
import datetime
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import wan_patches
from wan_patches.bindings.output_buffers import OutputBuffers, writing_to
from wan_patches.executor import errors
from wan_patches.executor.images import Frame
from wan_patches.executor.session import Report, Session
from wan_patches.executor.state import unchanged
from wan_patches.executor.transport import Message, Packed, pack
from wan_patches.pipelines.streaming import Chunk

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl", "xpu": "cpu:gloo,xpu:xccl"}
_SLOWEST_LOAD = datetime.timedelta(hours=1)  # time limit for other ranks to join; a store's default is 5 minutes


class Rank:
    """Runs a session with each request's patches; only the first rank returns results, packed.

    One thread calls `load`, `run` and `close`; any thread may call `interrupt`.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        """`rank`: index of this process among the `ranks` of its group. `device`: device of this process."""
        self._rank, self._ranks, self._device = rank, ranks, device
        self._session: Session | None = None
        self._patches: dict[str, Any] | None = None

    def load(
        self,
        build: Callable[[], tuple[Callable[[], Any], dict[str, Any]]],
        patches: dict[str, Any] | None,
        store: Any = None,
    ) -> None:
        """Builds the pipeline.

        Args:
            build: returns the factory, and the arguments `layout`, `parallel` and `vae_parallel` of `Session` by name;
                called after patches and process group are set up, since unpickling may depend on them.
            patches: arguments of `enable`; None to disable all patches.
            store: torch.distributed store through which several ranks find one another.
        """
        self._use(patches)
        if self._ranks > 1:
            store.set_timeout(_SLOWEST_LOAD)
            torch.distributed.init_process_group(
                _BACKENDS.get(self._device.type, "gloo"), store=store, rank=self._rank, world_size=self._ranks
            )
        factory, options = build()
        self._session = Session(factory, device=self._device, ranks=self._ranks, **options)

    def run(
        self,
        request: int,
        inputs: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        seed: int | None,
        patches: dict[str, Any] | None,
        empty_strided: Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor],
        report: Report,
        on_frames: Callable[[Chunk], object] | None = None,
    ) -> tuple[Packed | None, dict[str, float]]:
        """Calls the pipeline.

        Args:
            request, seed, report, on_frames: as for `Session.run`; only the first rank reports and has frames.
            inputs: returns the positional and keyword arguments of the pipeline.
            patches: as for `load`.
            empty_strided: allocates memory for finished frames, as in `wan_patches.bindings.output_buffers`.

        Returns:
            The result (None in all but the first rank), and the seconds of the pipeline's stages.

        Raises:
            Interrupted, Exception: as for `Session.run`, and errors of unpickling the inputs or pickling the result.
        """
        assert self._session is not None
        self._use(patches)
        arguments, keywords = inputs()
        if self._rank:
            with unchanged():
                _, timings = self._session.run(request, arguments, keywords, seed=seed)
            return None, timings
        with unchanged(), writing_to(OutputBuffers(empty_strided=empty_strided, image=Frame)):
            result, timings = self._session.run(
                request, arguments, keywords, seed=seed, report=report, on_frames=on_frames
            )
            return pack(result), timings

    def interrupt(self, request: int) -> None:
        """Stops that request at its next step."""
        if self._session is not None:
            self._session.interrupt(request)

    def close(self) -> None:
        """Leaves the process group."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _use(self, patches: dict[str, Any] | None) -> None:
        if patches == self._patches:
            return
        if patches is None:
            wan_patches.disable()
        else:
            wan_patches.enable(**patches)
        self._patches = patches


def failed(error: BaseException) -> tuple[str, Packed]:
    """Returns an exception's traceback as text, and the exception packed, without references to the pipeline."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except BaseException:  # its __str__ can raise anything
        text = "".join(traceback.format_tb(error.__traceback__))
    with contextlib.suppress(RuntimeError):  # some frames are still running
        traceback.clear_frames(error.__traceback__)
    return text, pack(errors.portable(error.with_traceback(None)))


def failure_of(message: Message) -> BaseException:
    """Returns the exception of a message that `failed` made, with the worker's traceback as its cause."""
    try:
        error = message.load()
    except Exception as problem:  # unpickling can run code of its class
        error = RuntimeError(f"a worker raised an exception that cannot be loaded here: {problem!r}")
    return errors.with_traceback(error, message.info)


def chosen_patches() -> dict[str, Any] | None:
    """Returns the patches enabled in this process, as arguments of `enable`; None if there are none."""
    choice = wan_patches._registry.chosen()
    if choice is None:
        return None
    names = None if choice.names is None else sorted(choice.names)
    return {"patches": names, "fidelity": choice.fidelity.value, "gate": choice.gate}
