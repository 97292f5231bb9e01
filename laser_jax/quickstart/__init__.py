"""The generated world, from nothing to a table of retrieval quality."""
