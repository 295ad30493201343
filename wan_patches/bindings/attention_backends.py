"""An attention backend for Ascend NPUs, registered by name in diffusers' table of backends."""

from __future__ import annotations

import importlib.util
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from wan_patches.ops.npu import attention, function, problem, problems
from wan_patches.patches.attention_backends import NAME
from wan_patches.patching.rewrite import Unknown

#: The attributes in which diffusers' enumeration stores its members and its registry stores the backends' data.
_MEMBERS = ("_member_names_", "_member_map_", "_value2member_map_")
_TABLES = ("_backends", "_constraints", "_supported_arg_names")


class _Backend:
    """Adds one name to diffusers' enumeration and registry of attention backends while the patch is installed.

    A model that was set to this backend keeps using it after removal, because its user chose it. Only the name becomes
    unknown.
    """

    def __init__(self) -> None:
        self._module: types.ModuleType | None = None
        self._member: Any = None
        self._is_used = False

    def put(self, module: types.ModuleType) -> None:
        """Adds the name. Raises `Unknown` if diffusers stores its backends differently."""
        names, table = _places(module)
        if self._module is not module:
            self._module, self._member, self._is_used = module, _new_member(names), False
        if names._member_map_.get(self._member.name, self._member) is not self._member:
            raise Unknown(f"diffusers has an attention backend {NAME!r} of its own")
        if self._member.name not in names._member_names_:
            names._member_names_.append(self._member.name)
        names._member_map_[self._member.name] = self._member
        names._value2member_map_[NAME] = self._member
        table.register(self._member, constraints=list(table._constraints[names._NATIVE_NPU]))(_laser_on(module))

    def take(self) -> None:
        """Removes the name, and the registry entries too if no model was set to use the backend."""
        if self._module is None:
            return
        names, table = _places(self._module)
        if names._member_map_.get(self._member.name) is not self._member:
            return
        names._member_names_.remove(self._member.name)
        del names._member_map_[self._member.name]
        if not self._is_used:
            del names._value2member_map_[NAME]
            for kept in _TABLES:
                getattr(table, kept).pop(self._member, None)

    def check(self, backend: object) -> bool:
        """Raises if this backend is requested but cannot be used; diffusers calls it to check a named backend.

        Returns False so that diffusers continues with its own checks.

        Raises:
            RuntimeError: torch_npu or MindIE-SD cannot be used.
        """
        if backend is not self._member or self._module is None:
            return False
        self._module._check_attention_backend_requirements(self._module.AttentionBackendName._NATIVE_NPU)
        if function(attention.PATH) is None:
            raise RuntimeError(f"Attention backend '{NAME}' needs MindIE-SD: {problem(attention.PATH)}")
        self._is_used = True
        return False


backend = _Backend()
check = backend.check


def advice() -> list[str]:
    """Returns the notes of `status()` on attention on this machine: an empty list if there is no NPU."""
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        return []
    mindie = importlib.util.find_spec("mindiesd") is not None
    names = f"'_native_npu', or '{NAME}' for long videos (computes in fp16)" if mindie else "'_native_npu'"
    fused = (
        "npu: fused attention is recommended, but not bit-identical and so never chosen for you: "
        f"pipe.transformer.set_attention_backend with {names}"
    )
    return [fused, *(f"npu: {problem}" for problem in problems())]


def _places(module: types.ModuleType) -> tuple[Any, Any]:
    names: Any = getattr(module, "AttentionBackendName", None)
    table: Any = getattr(module, "_AttentionBackendRegistry", None)
    known = all(isinstance(getattr(names, kept, None), (dict, list)) for kept in _MEMBERS) and all(
        isinstance(getattr(table, kept, None), dict) for kept in _TABLES
    )
    if not known or not hasattr(names, "_NATIVE_NPU") or names._NATIVE_NPU not in table._backends:
        raise Unknown("its attention backends are not kept as they are known")
    return names, table


def _new_member(names: Any) -> Any:
    member = str.__new__(names, NAME)
    member._name_, member._value_, member.__objclass__ = NAME.upper(), NAME, names
    member._sort_order_ = len(names._member_names_)
    return member


def _laser_on(module: types.ModuleType) -> Callable[..., Any]:
    """Returns the backend, with the parameters of the installed `_native_npu`.

    It rejects options that `_native_npu` would ignore.
    """
    names, table = _places(module)
    fused_parameters = inspect.signature(table._backends[names._NATIVE_NPU]).parameters

    def mindiesd_laser(query: Any, key: Any, value: Any, **options: Any) -> Any:
        given = {name: option for name, option in options.items() if option is not None and option is not False}
        for name in ("attn_mask", "is_causal"):
            if name in given and name not in fused_parameters:
                raise ValueError(f"Attention backend '{NAME}' takes no `{name}` in this version of diffusers.")
        if "_parallel_config" in given:  # diffusers rejects it too, except 0.36 in one order of calls
            raise ValueError(f"Attention backend '{NAME}' does not support context parallelism.")
        if not given.get("dropout_p") and given.keys() <= {"scale", "dropout_p"} and attention.fits(query, key, value):
            return attention.laser_attention(query, key, value, given.get("scale"))
        options = {name: option for name, option in options.items() if name in fused_parameters}
        return table._backends[names._NATIVE_NPU](query, key, value, **options)

    kinds = [*fused_parameters.values()]
    kinds += [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (("attn_mask", None), ("is_causal", False))
        if name not in fused_parameters
    ]
    mindiesd_laser.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return mindiesd_laser
