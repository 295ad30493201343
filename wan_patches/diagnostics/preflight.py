"""Files that are written after long work: what would keep them from it is said before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["check_file", "check_folder"]


def check_file(path: str | Path) -> None:
    """Tries whether a file can be written, and leaves everything as it was.

    Raises:
        OSError: it cannot; the message says why, and what to do.
    """
    given, path = path, Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{given} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        return  # a pipe or a terminal, where somebody would notice, or have to be waited for
    path = Path(os.path.realpath(path))  # what would be made where a link leads nowhere
    try:
        # not the file itself, which other ranks may try at the same time
        with open(path, "r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{given} cannot be written: {error.strerror}") from None


def check_folder(path: str | Path) -> None:
    """Tries whether files can be written into a folder, which may still have to be made; leaves everything as it was.

    Raises:
        OSError: they cannot; the message says why.
    """
    absolute = Path(path).absolute()
    nearest = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is not a folder: give another place than {path}")
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"nothing can be written into {path}: {error.strerror}") from None
