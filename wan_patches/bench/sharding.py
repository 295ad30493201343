"""Benchmarks the memory of weights that are divided among ranks, during loading and during a forward.

A transformer of Wan's real architecture with random weights is saved in float32, in several files. Three variants load
it: whole in one process, whole in every rank and then divided (`place` alone), and divided while it is read
(`loading_sharded`). Every variant runs in new processes, and its output is compared with the whole model's.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from rich import box
from rich.console import Group
from rich.table import Table

from wan_patches.bench.measure import MeasurementError, peak_extra_bytes
from wan_patches.diagnostics.machine import machine
from wan_patches.executor.layouts import loading_sharded, place

WAYS = ("whole", "divided after loading", "divided on load")

_MIB = 1 << 20
_SECONDS = 900.0  # timeout of a rank
_CONTEXT = multiprocessing.get_context("spawn")
_CPU = torch.device("cpu")

# Wan 2.1 T2V 1.3B, with fewer than its 30 blocks; and a tiny model
_FULL: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 12, "text_dim": 4096}
_QUICK: dict[str, Any] = {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 6, "text_dim": 64}


@dataclass(frozen=True)
class Row:
    """One variant: MiB in the rank with the highest use, above its use before; None if the device has no counters.

    `load` is the peak while the model is loaded and placed, `held` the use afterwards, `forward` the peak of a call. On
    an accelerator, these numbers come from torch's allocator, and `host` is the peak of the process while it loads. On
    the CPU, they are the resident set, which includes pages of mapped files.
    """

    way: str
    ranks: int
    dtype: str
    weights_mib: float
    block_mib: float
    load_mib: float | None
    held_mib: float
    forward_mib: float | None
    host_mib: float | None
    exact: bool

    @property
    def load_ratio(self) -> float | None:
        """Peak during loading, divided by the size of the model."""
        return None if self.load_mib is None else self.load_mib / self.weights_mib

    @property
    def forward_ratio(self) -> float | None:
        """Peak during a call, divided by the size of the model."""
        return None if self.forward_mib is None else self.forward_mib / self.weights_mib


def measure(
    device: torch.device, dtype: torch.dtype, *, ranks: int = 2, quick: bool = False, folder: Path | None = None
) -> list[Row]:
    """Measures the three variants.

    Args:
        device: the kind of device; each rank has its own accelerator.
        dtype: dtype to load the weights in.
        ranks: number of processes that share the weights.
        quick: uses a tiny model instead of one of 1.2 GB (bf16).
        folder: folder for the temporary checkpoint of 2.2 GB; by default, the system's temporary folder.

    Raises:
        MeasurementError: there are fewer than two ranks, or fewer devices than ranks.
    """
    if ranks < 2:
        raise MeasurementError(f"Dividing weights takes 2 ranks or more, not {ranks}.")
    if device.type != "cpu" and (found := torch.get_device_module(device).device_count()) < ranks:
        raise MeasurementError(
            f"There are {found} devices of the kind {device.type!r}, and {ranks} ranks need one each."
        )
    with tempfile.TemporaryDirectory(prefix="wan-patches-", dir=folder) as temporary, _returning_freed_memory():
        checkpoint = Path(temporary) / "checkpoint"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model: Any = diffusers.WanTransformer3DModel(**(_QUICK if quick else _FULL))
        model.save_pretrained(checkpoint, max_shard_size="1MB" if quick else "500MB")
        del model
        gc.collect()
        rows: list[Row] = []
        expected: str | None = None
        for way in WAYS:
            each = _run(way, 1 if way == "whole" else ranks, device, dtype, checkpoint)
            expected = expected or each[0].digest
            rows.append(_row(way, each, dtype, all(rank.digest == expected for rank in each)))
        return rows


@contextlib.contextmanager
def _returning_freed_memory() -> Iterator[None]:
    """Makes glibc return freed memory to the system at once, in processes that are started in the block.

    Otherwise the processes keep freed memory, and the resident set shows earlier use. Counters of accelerators exclude
    freed memory.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(1 << 16)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _row(way: str, ranks: list[Any], dtype: torch.dtype, exact: bool) -> Row:
    def most(name: str) -> Any:
        sizes = [getattr(rank, name) for rank in ranks]
        return None if None in sizes else max(sizes) / _MIB

    sizes = {f"{name}_mib": most(name) for name in ("weights", "block", "load", "held", "forward", "host")}
    return Row(way=way, ranks=len(ranks), dtype=str(dtype).removeprefix("torch."), exact=exact, **sizes)


# The ranks


def _run(way: str, ranks: int, device: torch.device, dtype: torch.dtype, checkpoint: Path) -> list[Any]:
    """Returns the measurements of each rank."""
    with tempfile.TemporaryDirectory(prefix="wan-patches-") as folder, contextlib.ExitStack() as stack:
        ends = []
        for rank in range(ranks):
            end, theirs = _CONTEXT.Pipe()
            on = _CPU if device.type == "cpu" else torch.device(device.type, rank)
            arguments = (theirs, way, rank, ranks, on, dtype, str(checkpoint), str(Path(folder) / "store"))
            process = _CONTEXT.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)  # runs before the join
            theirs.close()
            ends.append(stack.enter_context(end))
        found = []
        for end in ends:
            try:
                answer = end.recv() if end.poll(_SECONDS) else f"no answer within {_SECONDS:.0f} s"
            except EOFError:
                answer = "the process has died"
            if isinstance(answer, str):
                raise RuntimeError(f"A rank of the variant {way!r} has failed: {answer}")
            found.append(SimpleNamespace(**answer))
        return found


def _rank(end: Any, way: str, rank: int, ranks: int, device: torch.device, dtype: torch.dtype, *files: str) -> None:
    try:
        torch.set_num_threads(1)
        checkpoint, store = files
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)
        if ranks > 1:
            dist.init_process_group(store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        end.send(_sizes(way, device, dtype, checkpoint))
        if ranks > 1:
            dist.destroy_process_group()
    except BaseException:
        end.send(traceback.format_exc())


def _sizes(way: str, device: torch.device, dtype: torch.dtype, checkpoint: str) -> dict[str, Any]:
    _warm_up(way, device, dtype)
    kept: list[Any] = []
    before = _held(device)
    load, host = _peaks(lambda: kept.append(_load(way, device, dtype, checkpoint)), device)
    model = kept[0]
    if way == "whole" and device.type == "cpu":
        for parameter in model.parameters():  # stock's may be mapped from the file, where kernels may round differently
            parameter.data = parameter.data.clone()
    held = _held(device) - before
    outputs: list[torch.Tensor] = []
    forward, _ = _peaks(lambda: outputs.append(_call(model, device, dtype)), device)
    return {
        "weights": _bytes(model),
        "block": _bytes(model.blocks[0]),
        "load": load,
        "held": held,
        "forward": None if forward is None else held + forward,
        "host": host,
        "digest": hashlib.sha256(outputs[0].view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def _load(way: str, device: torch.device, dtype: torch.dtype, checkpoint: str) -> Any:
    with loading_sharded(device) if way == WAYS[2] else contextlib.nullcontext():
        model = diffusers.WanTransformer3DModel.from_pretrained(checkpoint, torch_dtype=dtype)
    return _placed(model, way, device)


def _placed(model: Any, way: str, device: torch.device) -> Any:
    if way == WAYS[0]:
        return model.to(device)
    place(SimpleNamespace(components={"transformer": model}), "sharded", device)
    return model


def _warm_up(way: str, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a small model, so that one-time allocations of torch and diffusers are not counted."""
    small: Any = diffusers.WanTransformer3DModel(**_QUICK | {"num_layers": 2})
    for parameter in small.parameters():
        parameter.data = parameter.data.to(dtype)
    _call(_placed(small, way, device), device, dtype)


def _call(model: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Calls the model on so few tokens that weights dominate the memory, and returns the output on the CPU."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 1, 8, 8, generator=generator).to(device, dtype),
            timestep=torch.tensor([500.0], device=device),
            encoder_hidden_states=torch.randn(1, 8, model.config.text_dim, generator=generator).to(device, dtype),
            return_dict=False,
        )[0].cpu()


def _peaks(call: Callable[[], Any], device: torch.device) -> tuple[int | None, int | None]:
    """Returns the peak of the device and, unless the device is the CPU, of the process."""
    if device.type == "cpu":
        return peak_extra_bytes(call, device), None
    found: list[int | None] = []
    host = peak_extra_bytes(lambda: found.append(peak_extra_bytes(call, device)), _CPU)
    return found[0], host


def _held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cpu":
        import psutil

        return psutil.Process().memory_info().rss
    return torch.get_device_module(device).memory_allocated()


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# Output


def table(rows: Sequence[Row]) -> Group:
    """Returns the rows as a table."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    found.add_column("weights are", overflow="fold")
    columns = [
        "ranks",
        "weights MiB",
        "peak at load MiB",
        "of weights",
        "held MiB",
        "peak in forward MiB",
        "of weights",
    ]
    on_accelerator = any(row.host_mib is not None for row in rows)
    for column in (*columns, *(["host at load MiB"] if on_accelerator else []), "exact"):
        found.add_column(column, justify="right")
    for row in rows:
        sizes = [_number(row.weights_mib), _number(row.load_mib), _ratio(row.load_ratio), _number(row.held_mib)]
        sizes += [_number(row.forward_mib), _ratio(row.forward_ratio)]
        sizes += [_number(row.host_mib)] if on_accelerator else []
        found.add_row(row.way, str(row.ranks), *sizes, "yes" if row.exact else "NO")
    notes = [f"Per rank. A block has {_number(row.block_mib)} MiB." for row in rows[:1]]
    return Group(found, *notes)


def _number(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:,.0f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def write_json(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    """Writes the rows and the facts about the machine."""
    lines = [{**asdict(row), "load_ratio": row.load_ratio, "forward_ratio": row.forward_ratio} for row in rows]
    path.write_text(json.dumps({"machine": machine(device), "rows": lines}, indent=2) + "\n")
