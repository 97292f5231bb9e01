"""Hard negatives for training rows, from a corpus."""
