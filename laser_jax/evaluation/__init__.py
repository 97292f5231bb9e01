"""Retrieval metrics and the BEIR and TREC files they read."""
