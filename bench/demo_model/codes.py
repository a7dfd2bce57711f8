"""Two families of +-1 code words whose pairwise inner products are bounded."""

from __future__ import annotations

import itertools

Code = tuple[int, ...]


def _field64() -> tuple[list[int], list[int]]:
    """Powers and logarithms of a generator of GF(64), modulus x^6 + x + 1."""
    powers = [1]
    while len(powers) < 63:
        value = powers[-1] << 1
        powers.append(value ^ 0b1000011 if value & 64 else value)
    logs = [0] * 64
    for exponent, value in enumerate(powers):
        logs[value] = exponent
    return powers, logs


def long_codes() -> list[Code]:
    """4,096 words of 64 signs, inner products of at most 16 in size: x -> Tr(a x^3 + b x) over GF(64)."""
    powers, logs = _field64()

    def times(x: int, y: int) -> int:
        return powers[(logs[x] + logs[y]) % 63] if x and y else 0

    def trace(x: int) -> int:
        total = 0
        for _ in range(6):
            total ^= x
            x = times(x, x)
        return total

    signs = [1 - 2 * trace(x) for x in range(64)]
    linear = [[signs[times(b, x)] for x in range(64)] for b in range(64)]
    cubic = [[signs[times(a, times(x, times(x, x)))] for x in range(64)] for a in range(64)]
    return [tuple(s * t for s, t in zip(cubic[a], linear[b])) for a in range(64) for b in range(64)]


def short_codes() -> list[Code]:
    """256 words of 15 signs, inner products from -15 to 5: the Nordstrom-Robinson code less one place.

    The code is the Gray image of the octacode, the extended cyclic code over Z4 of x^3 + 2x^2 + x - 1.
    """
    generator = (3, 1, 2, 1, 0, 0, 0)
    rows = []
    for shift in range(4):
        row = generator[-shift:] + generator[:-shift] if shift else generator
        rows.append(row + ((-sum(row)) % 4,))
    gray = ((1, 1), (1, -1), (-1, -1), (-1, 1))
    codes = []
    for factors in itertools.product(range(4), repeat=4):
        word = [sum(f * row[i] for f, row in zip(factors, rows)) % 4 for i in range(8)]
        codes.append(tuple(sign for symbol in word for sign in gray[symbol])[:15])
    return codes
