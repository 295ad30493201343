"""A device `emulated`, which takes kernels as an NVIDIA GPU does, in Triton's interpreter.

`install` registers it. As a pytest plugin (`-p with_kernels`) it does so before tests are collected, and has forms
tried for tensors of any size. Its operations are the CPU's, so that norms have another order than on a GPU: see
`order_of_cuda`. Triton must not be imported before, as it decides at import whether it interprets.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAME = "emulated"

#: Kernels that ran, by module and name.
launches: Counter[str] = Counter()


def install() -> None:
    """Registers the device, once per process; raises `RuntimeError` if it cannot be built."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from emulated_device import install, missing

    if reason := missing():
        raise RuntimeError(f"the emulated device cannot be built: {reason}")
    torch.set_num_threads(1)  # small models only wait for more
    version = f"torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
    install(NAME, Path(__file__).parents[2] / ".pytest_cache" / "d" / "emulated_device" / version)
    _take_kernels()
    _share_memory_with_the_interpreter()
    _round_to_nearest()


def pytest_configure() -> None:
    install()


@pytest.fixture(autouse=True)
def _any_size() -> Iterator[None]:
    from wan_patches.ops.dispatch import at_any_size

    with at_any_size():
        yield


def _take_kernels() -> None:
    from wan_patches.ops import proof
    from wan_patches.ops import triton as kernels
    from wan_patches.ops.dispatch import Op

    proof.ROWS = 64  # the interpreter is slow
    forms_on: Any = Op._forms_on
    Op._forms_on = lambda op, device: forms_on(op, "cuda" if device == NAME else device)  # type: ignore[method-assign]
    kernels.is_usable = lambda device: device.type == NAME


def _share_memory_with_the_interpreter() -> None:
    """The interpreter cannot copy arguments from this device; but all its memory is the host's."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    run: Any = InterpretedFunction.run

    def on_host(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != NAME:
            return value
        storage = value.untyped_storage()
        buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory = torch.frombuffer(buffer, dtype=torch.uint8)
        host = torch.empty(0, dtype=value.dtype)
        return host.set_(memory.untyped_storage(), value.storage_offset(), value.size(), value.stride())

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(kernel, *map(on_host, args), **kwargs)
        launches[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__.lstrip('_')}"] += 1
        return result

    InterpretedFunction.run = counted


def _round_to_nearest() -> None:
    sys.path.append(str(Path(__file__).parents[1] / "ops" / "triton" / "interpreted"))
    from rounding import rounding
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    builder.cast_impl = rounding(builder.cast_impl)
