"""Exact search over directories of vectors, ties in trec_eval's order."""

from laser_jax.search.topk import device_mesh, exact_top_k, search
from laser_jax.search.trec import trec_order

__all__ = ["device_mesh", "exact_top_k", "search", "trec_order"]
