"""What the demo, the benchmarks and the tests run on."""
