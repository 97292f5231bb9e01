"""LaSER in JAX: dense retrieval with an LLM that thinks before it embeds.

`LatentRetriever` makes vectors of texts; `encode` and `load_pretrained` are what a user's own
pipeline needs. The programs are
`python -m laser_jax.train`, `.pretrain`, `.think` and `.quickstart`.
"""

from laser_jax.encoder import encode, encode_all_steps, load_pretrained
from laser_jax.retriever import LatentRetriever

__all__ = ["LatentRetriever", "encode", "encode_all_steps", "load_pretrained"]
