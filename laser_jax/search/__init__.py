"""Exact search over document vectors: on the device, ties in trec_eval's order."""
