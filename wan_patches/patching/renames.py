"""Public names that have changed: the old ones work for one more release, with a warning."""

from __future__ import annotations

import warnings


def renamed(old: str, new: str) -> property:
    """A property under the name `old` that gives the attribute `new`."""

    def get(instance: object) -> object:
        warnings.warn(f"`{old}` is called `{new}` now", DeprecationWarning, stacklevel=2)
        return getattr(instance, new)

    return property(get, doc=f"The former name of `{new}`.")
