"""Functions that rewritten code calls: they pass tensors from diffusers' objects to ops, or fall back to stock."""
