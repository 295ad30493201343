"""Pure functions on tensors, one module per op; independent of diffusers."""
