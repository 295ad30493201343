"""Workers import the pipelines of these tests, which build on those of the executor's: both folders are on the path."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "executor")]
