"""Which sequence comes when: a shuffle that needs no memory, and the same on any number of processes."""

import numpy as np

ROUNDS = 4  # a Feistel network of four rounds is a pseudo-random permutation (Luby and Rackoff, 1988)


def _mix(value, key):
    """A well-spread 64-bit hash of uint64 values (the finisher of splitmix64); overflow wraps on purpose."""
    value = (value + key) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def shuffled(index, n, seed):
    """Where each of `index` (ints in [0, n)) goes in the seed-th permutation of range(n), as int64.

    Any part of the permutation costs only itself, so a run can go on at any step; being arithmetic on integers, it is
    the same on every machine and with every version of numpy.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _mix(np.arange(1, ROUNDS + 1, dtype=np.uint64), _mix(np.array([seed], np.uint64), np.uint64(0)))
    places = np.asarray(index, dtype=np.uint64).copy()
    outside = np.ones(places.shape, dtype=bool)
    while outside.any():  # cycle-walking: go on until the place lies below n
        left, right = places[outside] >> half_bits, places[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        places[outside] = left << half_bits | right
        outside = places >= n
    return places.astype(np.int64)
