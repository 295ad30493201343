"""Where in diffusers each op goes: one module per concern, covering every family that has it."""
