"""Measurements behind the demo and the benchmarks; the tests use parts of them."""
