"""Exact search over directories of vectors, ties in trec_eval's order."""
