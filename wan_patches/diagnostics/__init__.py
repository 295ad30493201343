"""Diagnostics of runs: bit equality, time, memory, and problems of the installation."""
