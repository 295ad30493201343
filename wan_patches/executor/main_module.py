"""The user's script, in workers: a factory that is defined in it can only be found if they import it too."""

from __future__ import annotations

import multiprocessing.spawn
import os
import pickle
import pickletools
from typing import Any

_IMPORTING = "WAN_PATCHES_WORKER_IMPORTS_MAIN"


def needed(factory: Any) -> dict[str, Any] | None:
    """What a worker must be told to find the factory and all that it names; None if nothing of it is in the script.

    Raises:
        ValueError: it is of an interactive session, which no other process can import.
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
    """Raises if the pickle `stream` of a request names something of the script, which workers have not imported.

    Raises:
        ValueError: it does.
    """
    if b"__main__" in stream and _names_main(stream):
        raise ValueError(
            "the request holds a function or an object of a class that is defined in the script (or notebook) itself, "
            "where workers do not find it; move it to a module and import it from there"
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
    """An executor that a script starts as it is imported would start workers that start workers.

    Raises:
        RuntimeError: a worker is importing the script that started it.
    """
    if _IMPORTING in os.environ:
        raise RuntimeError(
            "this script starts a ParallelExecutor when it is imported, and workers import it because the factory is "
            'defined in it. Put what starts the executor under `if __name__ == "__main__":`'
        )
