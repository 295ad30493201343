"""The patches: where each op is applied in diffusers. One module per concern, for all model families that have it."""
