"""`serve_films.py SERVICE.py SECONDS`: the example's service; each of two workers makes a film in so many seconds."""

from __future__ import annotations

import runpy
import sys

import films

from wan_patches import ParallelExecutor

if __name__ == "__main__":
    service, seconds = runpy.run_path(sys.argv[1], run_name="service"), float(sys.argv[2])
    executor = ParallelExecutor(films.films, devices=["cpu", "cpu"], threads=1)
    with executor:
        limits = service["Limits"](waiting=64, drain=60.0)
        application = service["Service"](executor, limits, steps=4, seconds=seconds)
        service["Server"](application, port=0).run()
