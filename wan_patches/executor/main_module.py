"""Imports the user's script in workers, which need it to unpickle a factory defined there."""

from __future__ import annotations

import multiprocessing.spawn
import os
import pickle
import pickletools
from typing import Any

_IMPORTING = "WAN_PATCHES_WORKER_IMPORTS_MAIN"


def needed(factory: Any) -> dict[str, Any] | None:
    """Returns the data with which a worker imports the script; None if the factory's pickle does not refer to it.

    Raises:
        ValueError: the factory is defined in an interactive session, which no other process can import.
    """
    if not _names_main(pickle.dumps(factory)):
        return None
    data: Any = multiprocessing.spawn.get_preparation_data("worker")
    main: dict[str, Any] = {name: data[name] for name in ("init_main_from_name", "init_main_from_path") if name in data}
    if not main:
        name = getattr(factory, "__qualname__", factory)
        raise ValueError(
            f"the factory {name!r} is defined in an interactive session (a notebook, a console), where workers cannot "
            "import it. Write it to a module, for example pipelines.py, and import it from there, or use "
            "ParallelExecutor.from_pretrained"
        )
    return main


def refuse(stream: bytes) -> None:
    """Rejects a request whose pickle `stream` refers to the script, which workers have not imported.

    Raises:
        ValueError: the pickle refers to the script.
    """
    if b"__main__" in stream and _names_main(stream):
        raise ValueError(
            "the request contains a function, or an object of a class, defined in the script (or notebook) itself, "
            "where workers cannot find it; move it to a module and import it from there"
        )


def _names_main(stream: bytes) -> bool:
    return any(argument == "__main__" for _, argument, _ in pickletools.genops(stream))


def load(main: dict[str, Any]) -> None:
    """Imports the parent's script under the name `__mp_main__`, as multiprocessing does."""
    os.environ[_IMPORTING] = "1"
    try:
        multiprocessing.spawn.prepare(main)
    finally:
        del os.environ[_IMPORTING]


def refuse_while_loading() -> None:
    """Rejects an executor in a script that a worker is importing: its workers would start workers in turn.

    Raises:
        RuntimeError: a worker is importing the script that started it.
    """
    if _IMPORTING in os.environ:
        raise RuntimeError(
            "this script starts a ParallelExecutor when it is imported, and workers import it because the factory is "
            'defined in it. Put what starts the executor under `if __name__ == "__main__":`'
        )
