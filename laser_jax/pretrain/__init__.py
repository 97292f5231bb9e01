"""A small backbone that learns to reason in words first."""
