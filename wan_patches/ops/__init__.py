"""Pure functions on tensors, one module per op; nothing here knows diffusers."""
