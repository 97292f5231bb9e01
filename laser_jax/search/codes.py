"""How vectors are stored: float32, float16, int8 or one bit a number.

Letters: C documents, D model, W stored width (D, or D / 8 bytes of bits).

The rows are unit vectors, as `encode` gives them, and only directions matter. So an int8 row needs
no scale beside it: float16 and int8 rows are brought back to length 1 when they are read.
"""

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Code = Literal["float32", "float16", "int8", "binary"]

Vectors = TypeVar("Vectors", np.ndarray, jax.Array)


def require_matrix(name: str, vectors: np.ndarray) -> None:
    """Raises a ValueError on what is no float32 matrix."""
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        got = f"{vectors.dtype} of shape {vectors.shape}"
        raise ValueError(f"{name} must be a float32 matrix, got {got}")


def encode_vectors(vectors_CD: np.ndarray, code: Code) -> np.ndarray:
    """Codes float32 unit rows for storage and search: [C, W] of the code's dtype, uint8 for binary.

    float16 rounds; int8 is round(127 v / max|v|), row by row; binary keeps the signs, eight to a
    byte, a positive number and 0 as 1. Raises a ValueError on rows that are not float32 of length 1
    (to 1e-3), and on a width that is no multiple of 8 for binary.
    """
    require_matrix("vectors", vectors_CD)
    if code == "float32":
        return vectors_CD
    lengths_C = np.linalg.norm(vectors_CD, axis=1)
    wrong_C = ~(np.abs(lengths_C - 1) < 1e-3)  # NaN too
    if wrong_C.any():
        row = int(wrong_C.argmax())
        raise ValueError(
            f"{code} keeps directions only, so rows must have length 1; row {row} has "
            f"{lengths_C[row]}. Divide each row by its length, or store float32"
        )
    if code == "float16":
        return vectors_CD.astype(np.float16)
    if code == "int8":
        largest_C = np.abs(vectors_CD).max(axis=1, keepdims=True)
        return np.rint(127 * (vectors_CD / largest_C)).astype(np.int8)
    if vectors_CD.shape[1] % 8:
        raise ValueError(f"binary wants a width that 8 divides, got {vectors_CD.shape[1]}")
    return np.packbits(vectors_CD >= 0, axis=1)


def decode_vectors(codes_CW: Vectors, code: Code) -> Vectors:
    """The float32 vectors [C, D] that coded rows stand for; a row of zeros stays zero. Jittable on
    jax arrays; on numpy arrays it is numpy, where every number of rows would else be compiled."""
    xp: Any = np if isinstance(codes_CW, np.ndarray) else jnp
    if code == "float32":
        return codes_CW
    if code == "binary":
        bits_CD = xp.unpackbits(codes_CW, axis=1)
        return (2.0 * bits_CD.astype(np.float32) - 1.0) / bits_CD.shape[1] ** 0.5
    values_CD = codes_CW.astype(np.float32)
    squares_C1 = xp.square(values_CD).sum(axis=1, keepdims=True)
    return values_CD / xp.sqrt(xp.where(squares_C1 == 0, 1.0, squares_C1))
