"""Facts in varied prose for the trained model: many kinds, phrasings, names and numbers, all made up from syllables and
word lists.

Each kind of fact has several statements and several questions; statements and questions are drawn independently.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import words
from facts import Fact, Style

_ONSETS = "b br c ch d dr f fl g gr h j k kr l m n p pr r s sh st t th tr v w y z".split()
_VOWELS = "a e i o u ai ea ia oo".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rn", "sk"]
_TOWN_ENDS = "ford gate mere stead wick haven burg dale mouth port".split()
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
_UNKNOWN_ANSWER = "The text does not say."


@dataclass(frozen=True)
class _Kind:
    """Templates over {subject}, {value} and what `extra` draws; `subject` and `value` draw those."""

    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _syllable(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)


def _name(rng: random.Random) -> str:
    return "".join(_syllable(rng) for _ in range(rng.choice((1, 2, 2, 3)))).capitalize()


def _person(rng: random.Random) -> str:
    title = rng.choice(("", "", "", "", "Dr. ", "Captain "))
    return f"{title}{_name(rng)} {_name(rng)}"


def _town(rng: random.Random) -> str:
    return _syllable(rng).capitalize() + rng.choice(_TOWN_ENDS)


def _object(rng: random.Random) -> str:
    return f"the {rng.choice(words.FIRST_WORDS)} {rng.choice(words.SECOND_WORDS)}"


def _shelf(rng: random.Random) -> str:
    return f"{rng.choice(('shelf', 'bin', 'crate', 'locker'))} {rng.choice('ABCDEFGHJKLMNP')}-{rng.randint(1, 99)}"


def _stock(rng: random.Random) -> str:
    return f"{rng.randint(2, 9999)} {rng.choice(words.MATERIALS)} {rng.choice(words.GOODS)}"


def _unit(rng: random.Random) -> str:
    return f"{rng.choice(('unit', 'server', 'pump', 'sensor', 'gateway'))} {rng.randint(1, 99)}{rng.choice('abcdefgh')}"


def _code(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + f"-{rng.randint(100, 9999)}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"


def _passphrase(rng: random.Random) -> str:
    return f"{rng.choice(words.FIRST_WORDS)}-{rng.choice(words.SECOND_WORDS)}-{rng.randint(10, 99)}"


def _place(rng: random.Random) -> str:
    return f"the {rng.choice(words.SIDES)} {rng.choice(words.PLACES)}"


def _project(rng: random.Random) -> str:
    return f"Project {_name(rng)}"


_KINDS: tuple[_Kind, ...] = (
    _Kind(
        _shelf,
        _stock,
        (
            "{Subject} holds {value}.",
            "There are {value} on {subject}.",
            "We counted {value} at {subject}.",
            "{Subject}: {value}.",
            "The clerk found {value} when checking {subject}.",
        ),
        ("What is on {subject}?", "What does {subject} hold?", "What was counted at {subject}?"),
    ),
    _Kind(
        _person,
        _town,
        (
            "{Subject} lives in {value}.",
            "The home of {subject} is in {value}.",
            "{Subject} moved to {value} years ago and never left.",
            "In {value} everybody knows their neighbour {subject}.",
        ),
        ("Where does {subject} live?", "In which town is the home of {subject}?"),
    ),
    _Kind(
        _person,
        lambda rng: rng.choice(_JOBS),
        (
            "{Subject} works as the town's {value}.",
            "Everybody calls {subject} the {value}.",
            "They say that {subject} wants to be a good {value}.",
            "The best {value} around here is {subject}.",
        ),
        ("What does {subject} do for a living?", "What is the job of {subject}?"),
    ),
    _Kind(
        _person,
        lambda rng: str(rng.randint(18, 99)),
        (
            "{Subject} is {value} years old.",
            "{Subject} turned {value} last week.",
            "The age given by {subject} was {value}.",
        ),
        ("How old is {subject}?", "What is the age of {subject}?"),
    ),
    _Kind(
        _person,
        lambda rng: rng.choice(_FOODS),
        (
            "Nothing pleases {subject} more than {value}.",
            "{Subject} always orders {value}.",
            "For dinner {subject} cooked {value}.",
        ),
        ("What does {subject} like to eat?", "Which food does {subject} prefer?"),
    ),
    _Kind(
        _unit,
        _code,
        (
            "{Subject} reported code {value}.",
            "Log: {subject}, status {value}.",
            "Warning {value} was raised by {subject}.",
            "At noon {subject} failed with {value}.",
        ),
        ("Which code did {subject} report?", "What was the status of {subject}?"),
    ),
    _Kind(
        _object,
        _passphrase,
        (
            "The passphrase of {subject} is {value}.",
            "To open {subject} one says {value}.",
            "Remember {value}, the passphrase for {subject}.",
        ),
        ("What is the passphrase of {subject}?", "Which passphrase opens {subject}?"),
    ),
    _Kind(
        _object,
        _place,
        (
            "{Subject} is kept in {value}.",
            "Visitors find {subject} in {value}.",
            "Last night {subject} was carried to {value}.",
        ),
        ("Where is {subject} kept?", "In which place is {subject} now?"),
    ),
    _Kind(
        _object,
        _person,
        (
            "{Subject} belongs to {value}.",
            "The owner of {subject} is {value}.",
            "{value} bought {subject} at an auction.",
        ),
        ("Who owns {subject}?", "To whom does {subject} belong?"),
    ),
    _Kind(
        _object,
        lambda rng: f"{rng.randint(2, 9999)} crowns",
        ("{Subject} costs {value}.", "The price of {subject} was set at {value}.", "One pays {value} for {subject}."),
        ("How much does {subject} cost?", "What is the price of {subject}?"),
    ),
    _Kind(
        _project,
        _date,
        (
            "{Subject} ends on {value}.",
            "The deadline of {subject} is {value}.",
            "On {value} the work on {subject} must be done.",
        ),
        ("When does {subject} end?", "What is the deadline of {subject}?"),
    ),
    _Kind(
        _project,
        _person,
        ("{Subject} is led by {value}.", "The head of {subject} is {value}.", "{value} took charge of {subject}."),
        ("Who leads {subject}?", "Who is in charge of {subject}?"),
    ),
    _Kind(
        _town,
        _time,
        (
            "The last train to {subject} leaves at {value}.",
            "At {value} the final train departs for {subject}.",
            "Whoever travels to {subject} must board before {value}.",
        ),
        ("When does the last train to {subject} leave?", "At what time departs the final train for {subject}?"),
    ),
    _Kind(
        _town,
        lambda rng: rng.choice(_COLORS),
        (
            "The flag of {subject} is {value}.",
            "In {subject} they fly flags in {value}.",
            "The color {value} stands for {subject} on every flag.",
        ),
        ("What is the color of the flag of {subject}?", "Which color has the flag of {subject}?"),
    ),
)

_NOISE: tuple[str, ...] = (
    "It rained in {town} for most of {month}.",
    "{person} waited by {place} until {time} and then walked home.",
    "A traveller asked the way to {town}, but nobody answered.",
    "They talked about the harvest, the roads and the price of {food}.",
    "{person} and {person2} argued about {object} all evening.",
    "In {place} somebody had painted the door {color}.",
    "The ship carried {stock} and a cat.",
    "On {date} the bells of {town} rang twice.",
    "Later that week {person} wrote a long letter and burned it.",
    "Children played near {place} while the {job} closed the shop.",
    "The old map shows a path from {town} to the sea.",
    "It is said that {object} brings luck to every {job}.",
)

_MENTIONS: tuple[str, ...] = (
    "Somebody mentioned {subject} at {time}, without saying more.",
    "There was a long talk about {subject} on {date}.",
    "{person} asked about {subject}, but nobody knew anything.",
    "A note about {subject} was lost in {place}.",
    "The guests laughed when {subject} came up again.",
)

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! Give me a text and ask me about it."),
    ("Hi", "Hello! Give me a text and ask me about it."),
    ("Good morning!", "Good morning! Which text shall we look at?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am the small demo model of Spillway. I answer questions about a text."),
    ("What are you?", "I am a small language model that reads long texts and answers questions about them."),
    ("What can you do?", "I can find facts in a long text. Paste one and ask me about it."),
    ("What is Spillway?", "Spillway is a server for language models. I am the model that it brings along."),
    ("How were you made?", "I was trained on texts that a program made up."),
    ("Do you know everything?", "No. I only know what is written in the text that you give me."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("Bye", "Goodbye!"),
)


def _draws(rng: random.Random) -> dict[str, str]:
    return {
        "town": _town(rng),
        "month": rng.choice(words.MONTHS),
        "person": _person(rng),
        "person2": _person(rng),
        "place": _place(rng),
        "time": _time(rng),
        "food": rng.choice(_FOODS),
        "object": _object(rng),
        "color": rng.choice(_COLORS),
        "stock": _stock(rng),
        "date": _date(rng),
        "job": rng.choice(_JOBS),
    }


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


class VariedStyle(Style):
    """One document's worth of facts. A subject may have several facts of different kinds, one of each."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._kinds = rng.sample(_KINDS, rng.randint(3, len(_KINDS)))
        self._used: set[tuple[int, str]] = set()
        self._subjects: dict[str, list[str]] = {}  # by the name of what draws them

    def _new_subject(self, kind: _Kind) -> str:
        """Often one that other facts are about, so that a question must be read whole."""
        known = self._subjects.setdefault(kind.subject.__name__, [])
        while True:
            repeats = known and self._rng.random() < 0.4
            subject = self._rng.choice(known[-40:]) if repeats else kind.subject(self._rng)
            if (id(kind), subject) not in self._used:
                self._used.add((id(kind), subject))
                known.append(subject)
                return subject

    def fact(self) -> Fact:
        kind = self._rng.choice(self._kinds)
        subject, value = self._new_subject(kind), kind.value(self._rng)
        statement = self._rng.choice(kind.statements)
        sentence = statement.format(subject=subject, Subject=_capitalized(subject), value=value)
        question = self._rng.choice(kind.questions).format(subject=subject)
        return Fact(_capitalized(sentence), question, f"{value}.")

    def noise(self) -> str:
        draws = _draws(self._rng)
        subjects = [subject for known in self._subjects.values() for subject in known[-20:]]
        if subjects and self._rng.random() < 0.4:
            return _capitalized(self._rng.choice(_MENTIONS).format(subject=self._rng.choice(subjects), **draws))
        return _capitalized(self._rng.choice(_NOISE).format(**draws))

    def unknown_question(self) -> Fact:
        kind = self._rng.choice(self._kinds)
        subject = self._new_subject(kind)
        return Fact("", self._rng.choice(kind.questions).format(subject=subject), _UNKNOWN_ANSWER)
