"""Public names that have changed."""

from __future__ import annotations

import pytest

from wan_patches.diagnostics.profiling import Profile


def test_an_old_name_works_and_warns():
    profile = Profile()
    profile.transfers = []
    with pytest.warns(DeprecationWarning, match="`crossings` is called `transfers` now"):
        assert profile.crossings is profile.transfers
