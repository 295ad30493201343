"""Reads pipelines: components, devices, stages and frames."""
