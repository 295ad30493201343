"""`wan-patches` with a device `emulated`, which takes kernels as an NVIDIA GPU does, in Triton's interpreter.

    python tests/emulated_device/command_line.py bench forms --device emulated --quick

Times mean nothing there. `wan-patches bench gpu --device emulated` starts its steps like this.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

NAME = "emulated"


def main() -> None:
    """Runs the command."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch
    from emulated_device import install, missing

    if reason := missing():
        sys.exit(f"Error: the emulated device cannot be built: {reason}")
    torch.set_num_threads(1)  # small models only wait for more
    version = f"torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
    install(NAME, Path(__file__).parents[2] / ".pytest_cache" / "d" / "emulated_device" / version)
    _take_kernels()
    from wan_patches.cli import main as command

    command()


def _take_kernels() -> None:
    from wan_patches.ops import triton as kernels
    from wan_patches.ops.dispatch import Op

    forms_on: Any = Op._forms_on
    Op._forms_on = lambda op, device: forms_on(op, "cuda" if device == NAME else device)  # type: ignore[method-assign]
    kernels.is_usable = lambda device: device.type == NAME
    _share_memory_with_the_interpreter()
    _round_to_nearest()


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

    InterpretedFunction.run = lambda kernel, *args, **kwargs: run(kernel, *map(on_host, args), **kwargs)


def _round_to_nearest() -> None:
    """The interpreter cuts digits off where it makes bf16 of fp32; GPUs round to the nearest, like torch."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    cast: Any = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding


if __name__ == "__main__":
    main()
