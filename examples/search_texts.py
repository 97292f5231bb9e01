"""Ranks a few texts for a question: `python examples/search_texts.py runs/world/laser/model`."""

from __future__ import annotations

import sys

import numpy as np

from laser_jax import LatentRetriever

DOCUMENTS = [
    "Ulm lies on the Danube.",
    "Kiel lies at the Baltic Sea.",
    "Jena makes lenses.",
]
TASK = "Find the passage that answers"


def main() -> None:
    retriever = LatentRetriever.from_pretrained(sys.argv[1])
    documents = retriever.encode_document(DOCUMENTS)
    for question in ("Which town lies on the Danube?", "Where are lenses made?"):
        query = retriever.encode_query(question, instruction=TASK)
        scores = retriever.similarity(query, documents)[0]
        print(question)
        for place in np.argsort(-scores):
            print(f"  {scores[place]:.3f}  {DOCUMENTS[place]}")


if __name__ == "__main__":
    main()
