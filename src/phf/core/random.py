"""Random numbers that depend on a seed and a purpose, never on the order of calls.

Any single draw can be computed without the draws before it, so resuming and splitting work change nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key64(*what: object) -> int:
    """A 64-bit key from anything with a stable `repr`, normally a seed and a purpose."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def uniforms(n: int, *what: object) -> np.ndarray:
    """`n` uniforms in [0, 1) that depend on `what` only (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(key64(*what))).random(n)


def uniforms_at(first: int, n: int, *what: object) -> np.ndarray:
    """Entries [first, first + n) of the endless sequence whose first entries `uniforms` gives. No other is computed."""
    philox = np.random.Philox(key64(*what))
    philox.advance(first // DRAWS_PER_STEP)
    skipped = first % DRAWS_PER_STEP
    return np.random.Generator(philox).random(skipped + n)[skipped:]


DRAWS_PER_STEP = 4
"""Numbers that Philox makes at each step of its counter."""


def permute(index: np.ndarray | int, n: int, key: int) -> np.ndarray:
    """The positions of `index` under a keyed permutation of [0, n). Other indices are not computed.

    A balanced Feistel network of 4 rounds on the smallest even number of bits that holds n. Values of n or more go
    through the network again (cycle walking, Black and Rogaway 2002), so the map is a bijection for every n and key.
    Raises IndexError for an index of n or more.
    """
    value = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    if value.size and int(value.max()) >= n:
        raise IndexError(f"index {int(value.max())} is not below {n}")
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    todo = np.ones(len(value), bool)
    while todo.any():
        left = value[todo] >> half
        right = value[todo] & mask
        for round_ in range(4):
            left, right = right, left ^ (mix64(right, key + round_ * 0x9E3779B97F4A7C15) & mask)
        value[todo] = (left << half) | right
        todo = value >= np.uint64(n)
    return value.astype(np.int64)


def mix64(x: np.ndarray, key: int) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), applied to x + key."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key & (2**64 - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
