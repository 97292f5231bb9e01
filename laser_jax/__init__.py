"""LaSER in JAX: dense retrieval with an LLM that thinks before it embeds.

`encode` and `load_pretrained` are what a user's own pipeline needs; the programs are
`python -m laser_jax.train`, `.pretrain`, `.think` and `.quickstart`.
"""

from laser_jax.encoder import encode, load_pretrained

__all__ = ["encode", "load_pretrained"]
