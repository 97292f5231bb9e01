"""Queries rewritten by a language model, the baseline."""
