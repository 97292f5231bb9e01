"""A corpus of any size to a directory of vectors."""
