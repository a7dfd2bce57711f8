"""Made-up names of people and towns, put together from syllables with a fixed seed."""

from __future__ import annotations

import random

_ONSETS = "b br c d dr f g gr h j k kr l m n p r s st t th tr v w z".split()
_VOWELS = "a e i o u ai ea ia".split()
_CODAS = "l m n r s x nd rn sk ld".split()
_TOWN_ENDS = "ford gate mere stead wick haven burg dale mouth port".split()


def _distinct(rng: random.Random, count: int, parts: tuple[list[str], ...], taken: set[str]) -> tuple[str, ...]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(part) for part in parts).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


_RNG = random.Random("names")
_TAKEN: set[str] = set()
GIVEN_NAMES = _distinct(_RNG, 200, (_ONSETS, _VOWELS, _ONSETS, list("aeio")), _TAKEN)
FAMILY_NAMES = _distinct(_RNG, 200, (_ONSETS, _VOWELS, _CODAS), _TAKEN)
TOWNS = _distinct(_RNG, 160, (_ONSETS, list("aeiou"), _TOWN_ENDS), _TAKEN)
