"""A torch.distributed store for the ranks of a group that opens no port to which others could connect."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_EVERY = 0.01  # polling interval in seconds for keys that another rank has not set yet


class Notes:
    """Values set by the ranks, by key. Thread-safe; no method blocks until a key is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self._values[key] = value

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        with self._lock:
            if self._values.get(key, b"") == expected:
                self._values[key] = desired
            return self._values.get(key, expected)

    def check(self, keys: Sequence[str]) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        with self._lock:
            return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        with self._lock:
            return len(self._values)


class Rendezvous(torch.distributed.Store):
    """A torch.distributed store backed by remote `Notes`."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        """`ask`: calls its first argument, a method of `Notes`, on the remote notes with the remaining arguments."""
        super().__init__()
        self._ask = ask

    def set(self, key: str, value: Any) -> None:
        self._ask(Notes.set, key, _bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._ask(Notes.get, key)

    def add(self, key: str, amount: int) -> int:
        return self._ask(Notes.add, key, amount)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return self._ask(Notes.compare_set, key, _bytes(expected), _bytes(desired))

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(Notes.check, list(keys))

    def delete_key(self, key: str) -> bool:
        return self._ask(Notes.delete_key, key)

    def num_keys(self) -> int:
        return self._ask(Notes.num_keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        end = time.monotonic() + (timeout or self.timeout).total_seconds()  # type: ignore[attr-defined]
        while not self.check(keys):
            if time.monotonic() > end:
                raise torch.distributed.DistStoreError(f"the other ranks have not set {list(keys)} in time")
            time.sleep(_EVERY)


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
