"""Tokens to a ranking in one compiled program: `python examples/one_program.py MODEL_DIRECTORY`.

The documents' vectors are an argument, the query is encoded, scored and ranked on the device, and
only the best few come back.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax import encode, load_pretrained
from laser_jax.data.tokenization import PromptTokenizer, load_tokenizer

DOCUMENTS = ["Ulm lies on the Danube.", "Kiel lies at the Baltic Sea.", "Jena lies on the Saale."]


def padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, [B, width], padded on the right."""
    ids_BT, mask_BT = np.zeros((2, len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, 1
    return ids_BT, mask_BT


def main() -> None:
    params, config = load_pretrained(sys.argv[1])
    params = jax.device_put(params)
    prompts = PromptTokenizer(load_tokenizer(sys.argv[1]), config.prompt)

    @jax.jit
    def embed(params, ids_BT, mask_BT):
        return encode(params, ids_BT, mask_BT, config=config)

    @jax.jit
    def rank(params, ids_BT, mask_BT, documents_CD):
        scores_BC = jnp.einsum("bd,cd->bc", embed(params, ids_BT, mask_BT), documents_CD)
        return jax.lax.top_k(scores_BC, 2)

    documents_CD = embed(params, *padded([prompts.document(text) for text in DOCUMENTS], 128))
    query = prompts.query("Which town lies on the Danube?", "Find the passage that answers")
    scores, places = rank(params, *padded([query], 128), documents_CD)
    for score, place in zip(scores[0], places[0], strict=True):
        print(f"{score:.3f}  {DOCUMENTS[int(place)]}")


if __name__ == "__main__":
    main()
