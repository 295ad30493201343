"""Checks before long work that its output files can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["check_file", "check_folder"]


def check_file(path: str | Path) -> None:
    """Checks that a file can be written, without changing anything.

    Raises:
        OSError: the file cannot be written; the message gives the reason and the remedy.
    """
    given, path = path, Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: create it first")
    if path.is_dir():
        raise IsADirectoryError(f"{given} is a folder: give a file name")
    if path.exists() and not path.is_file():
        return  # a pipe or a terminal: opening it may block, or be noticed at the other end
    path = Path(os.path.realpath(path))  # the file that a dangling link would create
    try:
        # does not create the file itself: other ranks may check it at the same time
        with open(path, "r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{given} cannot be written: {error.strerror}") from None


def check_folder(path: str | Path) -> None:
    """Checks that files can be written to a folder, which need not exist yet, without changing anything.

    Raises:
        OSError: files cannot be written there; the message gives the reason.
    """
    absolute = Path(path).absolute()
    nearest = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be created, because {nearest} is not a folder: give another path")
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"the folder {path} is not writable: {error.strerror}") from None
