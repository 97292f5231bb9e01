"""LaSER in JAX: dense retrieval with an LLM that thinks before it embeds.

`LatentRetriever` makes vectors of texts; `encode` and `load_pretrained` are what a user's own
pipeline needs. `laser --help` lists the programs, each of which
`python -m laser_jax.ROOM` starts too.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laser_jax.encoder import encode, encode_all_steps, load_pretrained
    from laser_jax.inference.retriever import LatentRetriever

__all__ = ["LatentRetriever", "encode", "encode_all_steps", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports jax only for who uses one of the four, so that programs start at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "inference.retriever" if name == "LatentRetriever" else "encoder"
    return getattr(import_module(f"{__name__}.{module}"), name)
