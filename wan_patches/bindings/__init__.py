"""What rewritten code calls: turns diffusers' objects into tensors, and hands them to ops or back to stock."""
