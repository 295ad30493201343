"""Shards weights over ranks with FSDP2, block by block: of a model in memory, or while its checkpoint is read.

Each rank holds its rows of every parameter. FSDP2 gathers the weights of a block before it runs, prefetches those of
the next block meanwhile, and frees them afterwards. Buffers, such as tables of rotary embeddings, are replicated.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wan_patches.pipelines.components import block_lists

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["is_sharded", "make_mesh", "shard", "sharding_on_load"]

logger = logging.getLogger("wan_patches")

_SHOWN = 10  # maximum number of names in an error message
_DENOISERS = ("diffusers.models.transformers.", "diffusers.models.unets.")


def make_mesh(device: torch.device, world: int) -> DeviceMesh:
    """Returns a mesh of all ranks for FSDP2. Raises RuntimeError if torch has no FSDP2."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"layout 'sharded' needs torch 2.6 or newer (FSDP2), not {torch.__version__}") from error
    return init_device_mesh(device.type, (world,))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shards the model over the ranks of `mesh` for inference; parameters on the meta device stay there.

    Raises ValueError for a model without lists of blocks.
    """
    from torch.distributed.fsdp import fully_shard

    lists = _blocks(model)
    model.requires_grad_(False)  # gradients need one dtype per FSDP group, but diffusers keeps some weights in fp32
    ignored = set()
    for parameter in model.parameters():
        if parameter.ndim == 0:  # rejected by FSDP
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
            ignored.add(parameter)
        elif not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}  # the root too, between requests
    if ignored:
        options["ignored_params"] = ignored
    for block in itertools.chain(*lists):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for blocks in lists:
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    if len(lists) == 1:  # with several lists, the order is unknown
        model.set_modules_to_forward_prefetch([lists[0][0]])  # type: ignore[operator]


def _blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Returns the model's lists of transformer blocks. Raises ValueError if there are none."""
    chosen = [list(blocks.values()) for blocks in block_lists(model)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no list of blocks for layout 'sharded' to shard")
    return chosen


# Sharding during loading


@contextmanager
def sharding_on_load(mesh: DeviceMesh, device: torch.device) -> Iterator[None]:
    """Makes `from_pretrained` of diffusers' transformers and UNets return sharded models, during the block.

    Replaces only the step that fills in the weights: one method of `ModelMixin`, for all threads. Everything else
    remains diffusers' own: files, variants, revisions, dtypes, the model itself with parameters on the meta device and
    initialised buffers, and warnings about unexpected keys.
    """
    import diffusers

    base: Any = diffusers.ModelMixin
    stock: Any = vars(base).get("_load_pretrained_model")
    taken = {"model", "state_dict", "resolved_model_file", "loaded_keys", "dtype", "keep_in_fp32_modules"}
    if stock is None or not taken <= {*inspect.signature(stock.__func__).parameters}:
        logger.warning("every rank loads all weights before they are sharded: unknown loader of this diffusers version")
        yield
        return
    signature = inspect.signature(stock.__func__)

    def load(cls: type, *arguments: Any, **keywords: Any) -> Any:
        bound = signature.bind(cls, *arguments, **keywords)
        given = bound.arguments
        if not any(part.__module__.startswith(_DENOISERS) for part in cls.__mro__):
            return stock.__func__(*bound.args, **bound.kwargs)
        model, files = given["model"], [str(file) for file in given["resolved_model_file"]]
        if reason := _obstacle(model, files, given):
            logger.warning("every rank loads all weights of %s before they are sharded: %s", cls.__name__, reason)
            return stock.__func__(*bound.args, **bound.kwargs)
        stored = _stored(model, files)
        _check(model, stored, files)
        given.update(state_dict=None, resolved_model_file=[])
        if "is_parallel_loading_enabled" in given:  # parallel loading over files, but the list is empty now
            given["is_parallel_loading_enabled"] = False
        result = stock.__func__(*bound.args, **bound.kwargs)  # warns about keys but loads nothing
        _fill(model, stored, _dtypes(model, stored, given), mesh, device)
        return result

    base._load_pretrained_model = classmethod(load)
    try:
        yield
    finally:
        base._load_pretrained_model = stock


def _obstacle(model: nn.Module, files: Sequence[str], given: Mapping[str, Any]) -> str | None:
    """Returns the reason why the model cannot be sharded during loading, or None."""
    if given.get("hf_quantizer") is not None:
        return "it is quantised"
    if given.get("device_map") is not None:
        return "it has a device map"
    if given.get("tp_shard_specs") is not None:
        return "it has a `parallel_config`"
    if given.get("dduf_entries"):
        return "its weights are in a DDUF archive"
    if not files or not all(file.endswith(".safetensors") for file in files):
        return "its weights are not in safetensors files"
    if not all(parameter.is_meta for parameter in model.parameters()):
        return "it is created with memory for all weights (without `accelerate`, or with low_cpu_mem_usage=False)"
    if given["dtype"] is not None and given["dtype"].itemsize < 2:
        return f"diffusers casts it to {given['dtype']} after loading"
    try:
        _blocks(model)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file. `floating` refers to the dtype in the file, not in the model."""

    file: str
    key: str
    shape: tuple[int, ...]
    floating: bool


def _stored(model: Any, files: Sequence[str]) -> dict[str, _Stored]:
    """Returns the tensors in the files by their names in the model."""
    found = {}
    for file in files:
        with _opened(file) as tensors:
            names = {key: key for key in tensors.keys()}  # noqa: SIM118
            if len(files) == 1:
                model._fix_state_dict_keys_on_load(names)  # as stock does; renames keys
            for name, key in names.items():
                part = tensors.get_slice(key)
                found[name] = _Stored(file, key, tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
    return found


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"{file} is not a safetensors file ({error}); for a git clone, run `git lfs install` and `git lfs pull`"
        ) from error
    with opened as tensors:
        yield tensors


def _check(model: nn.Module, stored: Mapping[str, _Stored], files: Sequence[str]) -> None:
    """Raises ValueError if parameters are missing from the files or have another shape there."""
    cls, at = type(model).__name__, f"{Path(files[0]).parent} ({_some(sorted(Path(file).name for file in files))})"
    missing = sorted(name for name, _ in model.named_parameters() if name not in stored)
    if missing:
        raise ValueError(f"{at} has no weights for {len(missing)} parameters of {cls}: {_some(missing)}")
    wrong = [
        f"{name} has shape {stored[name].shape} in {Path(stored[name].file).name}, and {tuple(tensor.shape)} in {cls}"
        for name, tensor in model.state_dict().items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{at} does not fit the configuration: {_some(wrong)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _dtypes(model: nn.Module, stored: Mapping[str, _Stored], given: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Returns the dtypes that stock's loader gives to the stored tensors."""
    kept = {*(given["keep_in_fp32_modules"] or ())}
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in stored:
            continue
        if given["dtype"] is None or not stored[name].floating:
            found[name] = tensor.dtype
        else:
            found[name] = torch.float32 if kept & {*name.split(".")} else given["dtype"]
    return found


def _fill(
    model: nn.Module,
    stored: Mapping[str, _Stored],
    dtypes: Mapping[str, torch.dtype],
    mesh: DeviceMesh,
    device: torch.device,
) -> None:
    """Shards a model on the meta device and reads this rank's part of its weights."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    shard(model, mesh, device)
    tensors = model.state_dict(keep_vars=True)
    parts = {name: _read(stored[name], tensors[name], dtype, device) for name, dtype in dtypes.items()}
    model.load_state_dict(parts, strict=False, assign=True)


def _read(stored: _Stored, like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Reads the stored tensor, or only this rank's rows if `like` is sharded.

    Opens the file for each tensor: pages read from an open file count as memory of the process.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        with _opened(stored.file) as tensors:
            return tensors.get_tensor(stored.key).to(device, dtype, copy=True)
    local = torch.empty(like.to_local().shape, dtype=dtype, device=device)
    if len(local):
        first = like.device_mesh.get_local_rank() * -(-len(like) // like.device_mesh.size())  # rows as by torch.chunk
        with _opened(stored.file) as tensors:
            local.copy_(tensors.get_slice(stored.key)[first : first + len(local)])
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
