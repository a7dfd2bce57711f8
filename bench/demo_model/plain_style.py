"""Facts in the closed grammar of the constructed model.

A fact is  ... FIRST SECOND MARKER VALUE .  with a value of one to three words; a question ends with  FIRST SECOND ? .
Everything else is noise that uses no marker.
"""

from __future__ import annotations

import random
import re

import words
from facts import Fact, Style

MARKERS: tuple[str, ...] = (" holds", " contains", " stores", " keeps", " received", " carries", ":")

OPENINGS: tuple[str, ...] = (
    "",
    "The ",
    "Note that ",
    "In the {side} {place}, ",
    "According to the {day} report, ",
    "On {day} the keeper wrote that ",
    "By the end of {month}, ",
    "As agreed with the {side} {place}, ",
    "In row {number} of the ledger, ",
    "After a long count in {month}, ",
    "For the {side} {place} the entry ",
)

MENTIONS: tuple[str, ...] = (
    "The keeper of {key} walked past the {side} {place} on {day}.",
    "Nobody asked about {key} before {month}.",
    "A letter from the {place} names {key} and {other} twice.",
    "The road from {key} to {other} was closed in {month}.",
    "On {day} the painter of {key} slept in the {place}.",
    "Both {key} and {other} were late again.",
    "We could see {key} from the {side} {place}.",
)

NOISE: tuple[str, ...] = (
    "Rain fell on the {side} {place} all {day}.",
    "In {month} the {place} was painted and the door was mended.",
    "{number} {goods} were sold at the {side} {place} in {month}.",
    "The clerk counted {number} {material} {goods} and went home.",
    "A cart with {goods} stood by the {side} {place} until {day}.",
    "It was a quiet {day}, and the {place} stayed shut.",
    "Someone left {number} {goods} near the {place}.",
)

QUESTIONS: tuple[str, ...] = (
    "What is listed for {key}?",
    "What does the record say about {key}?",
    "Which goods belong to {key}?",
    "What was counted at {key}?",
    "Tell me, what is written next to {key}?",
    "What did they find under {key}?",
)


def fixed_words() -> list[str]:
    """Every word of the templates, in the spelling that they use."""
    text = " ".join((*OPENINGS, *MENTIONS, *NOISE, *QUESTIONS, *MARKERS))
    return sorted(set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))))


def _fill(rng: random.Random, template: str, **given: str) -> str:
    return template.format(
        side=rng.choice(words.SIDES),
        place=rng.choice(words.PLACES),
        day=rng.choice(words.DAYS),
        month=rng.choice(words.MONTHS),
        number=rng.randint(100, 999),
        material=rng.choice(words.MATERIALS),
        goods=rng.choice(words.GOODS),
        **given,
    )


class PlainStyle(Style):
    """One document's worth of facts: keys never repeat, values do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()
        self._recent: list[str] = []
        self._values: list[str] = []

    def _new_key(self) -> str:
        while True:
            first, second = self._rng.choice(words.FIRST_WORDS), self._rng.choice(words.SECOND_WORDS)
            if self._recent and self._rng.random() < 0.3:  # a near miss: one word shared with an earlier key
                kept = self._rng.choice(self._recent).split()
                first, second = (kept[0], second) if self._rng.random() < 0.5 else (first, kept[1])
            key = f"{first} {second}"
            if key not in self._used:
                self._used.add(key)
                self._recent = [*self._recent[-63:], key]
                return key

    def _new_value(self) -> str:
        if self._values and self._rng.random() < 0.2:  # the same value under another key
            return self._rng.choice(self._values)
        template = self._rng.choice(("{number}", "{number} {goods}", "{number} {material} {goods}"))
        value = _fill(self._rng, template)
        self._values = [*self._values[-63:], value]
        return value

    def fact(self) -> Fact:
        key, value = self._new_key(), self._new_value()
        subject = _fill(self._rng, self._rng.choice(OPENINGS)) + key + self._rng.choice(MARKERS)
        question = self._rng.choice(QUESTIONS).format(key=key)
        return Fact(f"{subject[0].upper()}{subject[1:]} {value}.", question, f"{value}.")

    def noise(self) -> str:
        if len(self._recent) < 2 or self._rng.random() < 0.5:
            return _fill(self._rng, self._rng.choice(NOISE))
        key, other = self._rng.sample(self._recent, 2)
        return _fill(self._rng, self._rng.choice(MENTIONS), key=key, other=other)

    def unknown_question(self) -> Fact:
        key = self._new_key()
        return Fact("", self._rng.choice(QUESTIONS).format(key=key), "unknown")
