"""The order of the rows: a keyed bijection, so that no permutation is stored and any position is reached at once."""

import hashlib

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6
Words = NDArray[np.uint64]


def rows_of_samples(samples: NDArray[np.int64], *, seed: int, num_rows: int) -> NDArray[np.int64]:
    """Return the row that each sample of a run reads; sample numbers grow without end over the epochs.

    A pure function of (seed, sample, number of rows): it knows neither ranks nor workers nor what was read before.
    Every epoch visits each row once.
    """
    epochs = samples // num_rows
    rows = np.empty_like(samples)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = permute(samples[inside] % num_rows, seed=seed, epoch=int(epoch), size=num_rows)
    return rows


def permute(positions: NDArray[np.int64], *, seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Map positions in [0, size) to values in [0, size), one to one.

    A Feistel network over the smallest power of two that holds `size`; a value outside is sent through it again until
    it falls inside (cycle walking, fewer than two passes on average).
    """
    num_bits = max(2, (size - 1).bit_length())
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), keys, num_bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, num_bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> Words:
    digest = hashlib.shake_256(f"row order 1: seed {seed}, epoch {epoch}".encode()).digest(8 * NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: Words, keys: Words, num_bits: int) -> Words:
    num_low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = values & low_mask, values >> num_low_bits
    # Halves of unequal width are never swapped: each round changes one half by a function of the other.
    for i in range(0, NUM_ROUNDS, 2):
        high = high ^ (_mix(low + keys[i]) & high_mask)
        low = low ^ (_mix(high + keys[i + 1]) & low_mask)
    return (high << num_low_bits) | low


def _mix(words: Words) -> Words:
    """Scatter the bits of each word: the finalizer of splitmix64 [Steele, Lea & Flood 2014]."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
