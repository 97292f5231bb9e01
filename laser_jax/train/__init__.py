"""A training run: layout, steps, checkpoints, export."""
