"""Weights divided among ranks by FSDP2, block by block: of a model in memory, or while its checkpoint is read.

Each rank holds its rows of every parameter. A block's weights are gathered when it is their turn, those of the next
while it computes, and let go after it. Buffers, such as tables of rotary embeddings, are whole in every rank.
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

_SHOWN = 10  # names in an error
_DENOISERS = ("diffusers.models.transformers.", "diffusers.models.unets.")


def make_mesh(device: torch.device, world: int) -> DeviceMesh:
    """All ranks, as FSDP2 wants them; RuntimeError where torch has no FSDP2."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"layout 'sharded' needs torch 2.6 or newer (FSDP2), not {torch.__version__}") from error
    return init_device_mesh(device.type, (world,))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has divided it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Divides the model among the ranks of `mesh`, for inference; what is on the meta device stays there.

    Raises ValueError for a model without lists of blocks.
    """
    from torch.distributed.fsdp import fully_shard

    lists = _blocks(model)
    model.requires_grad_(False)  # groups with gradients must be of one dtype, and diffusers keeps some in fp32
    ignored = set()
    for parameter in model.parameters():
        if parameter.ndim == 0:  # refused by FSDP
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
            ignored.add(parameter)
        elif not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}  # the root, too, between requests
    if ignored:
        options["ignored_params"] = ignored
    for block in itertools.chain(*lists):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for blocks in lists:
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
    if len(lists) == 1:  # of several, nobody knows which comes first
        model.set_modules_to_forward_prefetch([lists[0][0]])  # type: ignore[operator]


def _blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Returns the transformer blocks, list by list; raises ValueError for a model without any."""
    chosen = [list(blocks.values()) for blocks in block_lists(model)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no list of blocks that layout 'sharded' could divide by")
    return chosen


# While the checkpoint is read


@contextmanager
def sharding_on_load(mesh: DeviceMesh, device: torch.device) -> Iterator[None]:
    """Inside, `from_pretrained` of transformers and UNets of diffusers gives models that are divided already.

    All that comes before the weights is diffusers' own (files, variants, revisions, dtypes, the model itself with its
    parameters on the meta device and its buffers made), and so are the warnings about unexpected keys. Only the step
    that fills in the weights is another: one method of `ModelMixin`, for all threads.
    """
    import diffusers

    base: Any = diffusers.ModelMixin
    stock: Any = vars(base).get("_load_pretrained_model")
    taken = {"model", "state_dict", "resolved_model_file", "loaded_keys", "dtype", "keep_in_fp32_modules"}
    if stock is None or not taken <= {*inspect.signature(stock.__func__).parameters}:
        logger.warning("every rank loads all weights before they are divided: this diffusers loads in a way not known")
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
            logger.warning("every rank loads all of %s before it is divided: %s", cls.__name__, reason)
            return stock.__func__(*bound.args, **bound.kwargs)
        stored = _stored(model, files)
        _check(model, stored, files)
        given.update(state_dict=None, resolved_model_file=[])
        if "is_parallel_loading_enabled" in given:  # by a thread for each file, and there is none
            given["is_parallel_loading_enabled"] = False
        result = stock.__func__(*bound.args, **bound.kwargs)  # warns about keys, and loads nothing
        _fill(model, stored, _dtypes(model, stored, given), mesh, device)
        return result

    base._load_pretrained_model = classmethod(load)
    try:
        yield
    finally:
        base._load_pretrained_model = stock


def _obstacle(model: nn.Module, files: Sequence[str], given: Mapping[str, Any]) -> str | None:
    """Why the model cannot be divided while it is read, or None."""
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
        return "it is made with memory for all weights (without `accelerate`, or with low_cpu_mem_usage=False)"
    if given["dtype"] is not None and given["dtype"].itemsize < 2:
        return f"diffusers casts it to {given['dtype']} after loading"
    try:
        _blocks(model)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file; `floating` is its own dtype, not the model's."""

    file: str
    key: str
    shape: tuple[int, ...]
    floating: bool


def _stored(model: Any, files: Sequence[str]) -> dict[str, _Stored]:
    """What the files have, under the names that the model has for it."""
    found = {}
    for file in files:
        with _opened(file) as tensors:
            names = {key: key for key in tensors.keys()}  # noqa: SIM118
            if len(files) == 1:
                model._fix_state_dict_keys_on_load(names)  # as stock does; it moves values to other keys
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
            f"{file} is no safetensors file ({error}); if it came by git, run `git lfs install` and `git lfs pull`"
        ) from error
    with opened as tensors:
        yield tensors


def _check(model: nn.Module, stored: Mapping[str, _Stored], files: Sequence[str]) -> None:
    """Raises ValueError for parameters that are not stored, or not with their shape."""
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
    """What stock's loader makes of each tensor that is stored."""
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
    """Divides the model, whose parameters have no memory yet, and reads this rank's part of it."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    shard(model, mesh, device)
    tensors = model.state_dict(keep_vars=True)
    parts = {name: _read(stored[name], tensors[name], dtype, device) for name, dtype in dtypes.items()}
    model.load_state_dict(parts, strict=False, assign=True)


def _read(stored: _Stored, like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The stored tensor, or this rank's rows of it if `like` is divided.

    The file is opened anew for each: what has been read of an open one counts as memory of the process.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        with _opened(stored.file) as tensors:
            return tensors.get_tensor(stored.key).to(device, dtype, copy=True)
    local = torch.empty(like.to_local().shape, dtype=dtype, device=device)
    if len(local):
        first = like.device_mesh.get_local_rank() * -(-len(like) // like.device_mesh.size())  # rows as in torch.chunk
        with _opened(stored.file) as tensors:
            local.copy_(tensors.get_slice(stored.key)[first : first + len(local)])
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
