"""TODO."""

from __future__ import annotations

import hashlib

import numpy as np


def key64(*what: object) -> int:
    """A 64-bit key from anything with a stable `repr`: randomness is derived from (seed, what), never from order."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def uniforms(n: int, *what: object) -> np.ndarray:
    """n uniforms in [0, 1), a function of `what` alone (counter-based: Philox)."""
    return np.random.Generator(np.random.Philox(key64(*what))).random(n)


def permute(index: np.ndarray | int, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of [0, n) puts each index, evaluated without the others.

    A balanced Feistel network of 4 rounds on the smallest even number of bits that holds n, walked until it falls
    below n (Black and Rogaway 2002): a bijection for every n and key.
    """
    value = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    if value.size and int(value.max()) >= n:
        raise IndexError(f"index {int(value.max())} is not below {n}")
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    todo = np.ones(len(value), bool)
    while todo.any():
        left, right = value[todo] >> half, value[todo] & mask
        for round_ in range(4):
            left, right = right, left ^ (mix64(right, key + round_ * 0x9E3779B97F4A7C15) & mask)
        value[todo] = (left << half) | right
        todo = value >= np.uint64(n)
    return value.astype(np.int64)


def mix64(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) of x + key."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key & (2**64 - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
