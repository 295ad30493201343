"""Exchanges the code of installed functions and restores it; independent of tensors and models."""
