"""From files of training rows to batches of tokens."""
