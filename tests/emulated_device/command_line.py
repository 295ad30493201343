"""`wan-patches` with the device `emulated`, which takes kernels as an NVIDIA GPU does, in Triton's interpreter.

    python tests/emulated_device/command_line.py bench forms --device emulated --quick

Times mean nothing there. `wan-patches bench gpu --device emulated` starts its steps like this.
"""

from __future__ import annotations

import sys

from order_of_cuda import operations
from with_kernels import install

if __name__ == "__main__":
    try:
        install()
    except RuntimeError as error:
        sys.exit(f"Error: {error}")
    from wan_patches.cli import main

    with operations():
        main()
