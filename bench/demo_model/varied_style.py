"""Facts in varied prose for the trained model: many kinds, phrasings, names and numbers, all made up.

Each kind of fact has several statements and several questions; statements and questions are drawn independently. A
statement names its subject before its value: who reads from left to right knows what the value belongs to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import names
import words
from facts import Fact, Style

_JOBS = tuple(
    """
    baker pilot nurse welder farmer tailor lawyer teacher painter surgeon plumber chemist barber sailor miner librarian
    gardener carpenter engineer translator photographer blacksmith accountant fisherman clockmaker
    """.split()
)
_FOODS = tuple(
    """
    soup bread rice cheese noodles dumplings pancakes olives mushrooms lentils apricots figs walnuts porridge salad stew
    """.split()
)
_COLORS = tuple("red blue green yellow purple orange white black brown pink gray silver golden violet teal".split())
_UNITS = tuple("unit server pump sensor gateway engine crane lift".split())
_STORES = tuple("shelf bin crate locker drawer rack".split())
UNKNOWN_ANSWER = "The text does not say."


@dataclass(frozen=True)
class _Kind:
    """Templates over {subject} and {value}, which `subject` and `value` draw."""

    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _person(rng: random.Random) -> str:
    return f"{rng.choice(names.GIVEN_NAMES)} {rng.choice(names.FAMILY_NAMES)}"


def _town(rng: random.Random) -> str:
    return rng.choice(names.TOWNS)


def _pair(rng: random.Random) -> str:
    return f"{rng.choice(words.FIRST_WORDS)} {rng.choice(words.SECOND_WORDS)}"


def _stock(rng: random.Random) -> str:
    return f"{rng.randint(2, 99)} {rng.choice(words.MATERIALS)} {rng.choice(words.GOODS)}"


def _unit(rng: random.Random) -> str:
    return f"{rng.choice(_UNITS)} {rng.randint(2, 99)}"


def _store(rng: random.Random) -> str:
    return f"{rng.choice(_STORES)} {rng.randint(2, 99)}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"


def _place(rng: random.Random) -> str:
    return f"{rng.choice(words.SIDES)} {rng.choice(words.PLACES)}"


_KINDS: tuple[_Kind, ...] = (
    _Kind(
        _store,
        _stock,
        (
            "In {subject} there are {value}.",
            "We counted what {subject} holds: {value}.",
            "The clerk opened {subject} and found {value}.",
            "At the end of the day {subject} held {value}.",
        ),
        ("What is in {subject}?", "What does {subject} hold?", "What was counted in {subject}?"),
    ),
    _Kind(
        _person,
        _town,
        (
            "They say that {subject} lives in {value}.",
            "The home of {subject} is in {value}.",
            "Years ago {subject} moved to {value}.",
            "Letters to {subject} must be sent to {value}.",
        ),
        ("Where does {subject} live?", "In which town is the home of {subject}?", "Where is {subject} at home?"),
    ),
    _Kind(
        _person,
        lambda rng: rng.choice(_JOBS),
        (
            "As everybody knows, {subject} works as a {value}.",
            "Everybody calls {subject} the {value}.",
            "They say that {subject} wants to be a good {value}.",
            "For ten years {subject} has been our {value}.",
        ),
        ("What does {subject} do for a living?", "What is the job of {subject}?", "What does {subject} work as?"),
    ),
    _Kind(
        _person,
        lambda rng: str(rng.randint(18, 99)),
        (
            "Last week {subject} turned {value}.",
            "The age given by {subject} was {value}.",
            "Somebody told us that {subject} is {value}.",
        ),
        ("How old is {subject}?", "What is the age of {subject}?"),
    ),
    _Kind(
        _person,
        lambda rng: rng.choice(_FOODS),
        (
            "Nothing pleases {subject} more than {value}.",
            "At the inn {subject} always orders {value}.",
            "For dinner {subject} cooked {value}.",
        ),
        ("What does {subject} like to eat?", "Which food does {subject} prefer?"),
    ),
    _Kind(
        _unit,
        _pair,
        (
            "At noon {subject} reported the code {value}.",
            "The log of {subject} shows the code {value}.",
            "A warning came from {subject}, code {value}.",
        ),
        ("Which code did {subject} report?", "What is the code of {subject}?"),
    ),
    _Kind(
        _pair,
        _pair,
        (
            "The passphrase of the {subject} is {value}.",
            "To open the {subject} one says {value}.",
            "Whoever guards the {subject} will ask for the words {value}.",
        ),
        ("What is the passphrase of the {subject}?", "Which passphrase opens the {subject}?"),
    ),
    _Kind(
        _pair,
        _place,
        (
            "Since spring the {subject} is kept in the {value}.",
            "Visitors find the {subject} in the {value}.",
            "Last night the {subject} was carried to the {value}.",
        ),
        ("Where is the {subject} kept?", "In which place is the {subject} now?"),
    ),
    _Kind(
        _pair,
        _person,
        (
            "For now the {subject} belongs to {value}.",
            "The owner of the {subject} is {value}.",
            "At an auction the {subject} was bought by {value}.",
        ),
        ("Who owns the {subject}?", "To whom does the {subject} belong?"),
    ),
    _Kind(
        _pair,
        lambda rng: f"{rng.randint(2, 99)} crowns",
        (
            "A copy of the {subject} costs {value}.",
            "The price of the {subject} was set at {value}.",
            "For the {subject} one pays {value}.",
        ),
        ("How much does the {subject} cost?", "What is the price of the {subject}?"),
    ),
    _Kind(
        _town,
        _time,
        (
            "The last train to {subject} leaves at {value}.",
            "Whoever travels to {subject} must board before {value}.",
            "From here the last train reaches {subject} at {value}.",
        ),
        ("When does the last train to {subject} leave?", "Which time is given for {subject}?"),
    ),
    _Kind(
        _town,
        lambda rng: rng.choice(_COLORS),
        (
            "The flag of {subject} is {value}.",
            "On every roof of {subject} they fly flags in {value}.",
            "The color of {subject} has always been {value}.",
        ),
        ("What is the color of the flag of {subject}?", "Which color has the flag of {subject}?"),
    ),
    _Kind(
        _town,
        _date,
        (
            "The fair of {subject} begins on {value}.",
            "Every year {subject} holds its fair on {value}.",
            "The people of {subject} celebrate on {value}.",
        ),
        ("When is the fair of {subject}?", "On which day does the fair of {subject} begin?"),
    ),
)

_NOISE: tuple[str, ...] = (
    "It rained in {town} for most of {month}.",
    "A stranger waited by the {place} until {time} and then walked home.",
    "A traveller asked the way to {town}, but nobody answered.",
    "They talked about the harvest, the roads and the price of {food}.",
    "Nobody in the {place} had seen {person} all evening.",
    "In the {place} somebody had painted the door {color}.",
    "The ship carried {stock} and a cat.",
    "On {date} the bells of {town} rang twice.",
    "Later that week {person} wrote a long letter and burned it.",
    "Children played near the {place} while the {job} closed the shop.",
    "The old map shows a path from {town} to the sea.",
    "It is said that the {pair} brings luck to every {job}.",
)

_MENTIONS: tuple[str, ...] = (
    "Somebody mentioned {subject} at {time}, without saying more.",
    "There was a long talk about {subject} on {date}.",
    "A {job} asked about {subject}, but nobody knew anything.",
    "A note about {subject} was lost in the {place}.",
    "The guests laughed when {subject} came up again.",
)


def _draws(rng: random.Random) -> dict[str, str]:
    return {
        "town": _town(rng),
        "month": rng.choice(words.MONTHS),
        "person": _person(rng),
        "place": _place(rng),
        "time": _time(rng),
        "food": rng.choice(_FOODS),
        "pair": _pair(rng),
        "color": rng.choice(_COLORS),
        "stock": _stock(rng),
        "date": _date(rng),
        "job": rng.choice(_JOBS),
    }


class VariedStyle(Style):
    """One document's worth of facts. A subject may have several facts of different kinds, one of each."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._kinds = rng.sample(_KINDS, rng.randint(3, len(_KINDS)))
        self._used: set[tuple[int, str]] = set()
        self._subjects: dict[str, list[str]] = {}  # by the name of what draws them

    def _new_subject(self, kind: _Kind) -> str | None:
        """Often one that other facts are about, so that a question must be read whole. None where all seem used."""
        known = self._subjects.setdefault(kind.subject.__name__, [])
        for _ in range(8):
            repeats = known and self._rng.random() < 0.4
            subject = self._rng.choice(known[-40:]) if repeats else kind.subject(self._rng)
            if (id(kind), subject) not in self._used:
                self._used.add((id(kind), subject))
                known.append(subject)
                return subject
        return None

    def _draw(self) -> tuple[_Kind, str]:
        while True:
            kind = self._rng.choice(self._kinds)
            subject = self._new_subject(kind)
            if subject is None:  # few subjects and a long text: on with other kinds
                self._kinds = list(_KINDS)
                continue
            return kind, subject

    def fact(self) -> Fact:
        kind, subject = self._draw()
        value = kind.value(self._rng)
        sentence = self._rng.choice(kind.statements).format(subject=subject, value=value)
        question = self._rng.choice(kind.questions).format(subject=subject)
        return Fact(sentence, question, f"{value}.", subject)

    def noise(self) -> str:
        draws = _draws(self._rng)
        subjects = [subject for known in self._subjects.values() for subject in known[-20:]]
        if subjects and self._rng.random() < 0.4:
            return self._rng.choice(_MENTIONS).format(subject=self._rng.choice(subjects), **draws)
        return self._rng.choice(_NOISE).format(**draws)

    def unknown_question(self) -> Fact:
        kind, subject = self._draw()
        return Fact("", self._rng.choice(kind.questions).format(subject=subject), UNKNOWN_ANSWER, subject)
