"""Training rows to sharded ArrayRecord."""
