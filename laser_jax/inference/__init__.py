"""Texts to vectors, many at once."""
