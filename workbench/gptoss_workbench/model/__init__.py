"""The model room: configuration, checkpoints, the transformer, its cache, generation."""
