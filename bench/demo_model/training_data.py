"""Batches for the trainer: documents followed by many questions and their answers, in chat form, with where to look."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from chat import ASSISTANT, BOS, END, USER, user_message
from documents import HELD_OUT, Document, Question, make_document, make_rng
from small_talk import SMALL_TALK

ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.1
_TURN_TOKENS = 17  # of a question with its answer, about
_SMALL_TALK_SHARE = 0.04  # of examples that are nothing else
_SMALL_TALK_TURNS = 0.03  # of turns after a document
_UNKNOWN_SHARE = 0.05
_NOWHERE = -1


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    length: int  # tokens of a sequence
    steps: int
    asked: tuple[float, float]  # the least and the largest share of a sequence that is questions and answers


CURRICULUM: tuple[Stage, ...] = (
    Stage(128, 600, (0.42, 0.62)),
    Stage(256, 80, (0.42, 0.62)),
    Stage(512, 160, (0.35, 0.6)),
    Stage(1024, 120, (0.25, 0.5)),
    Stage(2048, 97, (0.15, 0.5)),
    Stage(1024, 100, (0.25, 0.5)),
    Stage(2048, 560, (0.1, 0.55)),
    Stage(1024, 100, (0.1, 0.5)),
)


@dataclass(frozen=True)
class Plan:
    """Which stage each step belongs to."""

    stages: Sequence[Stage]
    batch_tokens: int

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


@dataclass
class Example:
    """Tokens, the weight of the loss of predicting each, and for each position where attention should go from there
    (_NOWHERE: anywhere). Subjects are looked up from values in the text and where an answer is being given."""

    tokens: list[int]
    weights: list[float]
    subject_end: list[int]
    subject_begin: list[int]
    source: list[int]  # from where a token of an answer is predicted: that token in the text

    def cut(self, length: int) -> Example:
        return Example(*(getattr(self, name)[:length] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Batch:
    """[rows, length] each."""

    tokens: torch.Tensor
    weights: torch.Tensor
    subject_end: torch.Tensor
    subject_begin: torch.Tensor
    source: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


class _Places:
    """Tokens of a text by characters."""

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        self._token_at = {}
        for index, (begin, end) in enumerate(offsets):
            for character in range(begin, end):
                self._token_at[character] = index

    def span(self, begin: int, length: int) -> tuple[int, int]:
        """First and last token of a part of the text."""
        return self._token_at[begin], self._token_at[begin + length - 1]


class ExampleMaker:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _count(self, text: str) -> int:
        """About: words and signs of the generated text are tokens."""
        return text.count(" ") + text.count(".") + text.count(",") + 2 * text.count(":") + 1

    def _small_talk(self, rng: random.Random) -> Question:
        said, answer = rng.choice(SMALL_TALK)
        return Question(said, answer, _NOWHERE, "")

    def _document(self, rng: random.Random, stage: Stage) -> tuple[Document, list[Question]]:
        asked = max(1, round(stage.length * rng.uniform(*stage.asked) / _TURN_TOKENS))
        unknown = sum(rng.random() < _UNKNOWN_SHARE for _ in range(asked))
        room = stage.length - asked * _TURN_TOKENS
        document = make_document("varied", rng, room, self._count, asked - unknown, unknown=unknown)
        turns = list(document.questions)
        rng.shuffle(turns)
        turns = [self._small_talk(rng) if rng.random() < _SMALL_TALK_TURNS else turn for turn in turns]
        return document, turns

    def make(self, rng: random.Random, stage: Stage) -> Example:
        if rng.random() < _SMALL_TALK_SHARE:
            document, turns = Document("", 0, []), [self._small_talk(rng) for _ in range(rng.randint(1, 4))]
        else:
            document, turns = self._document(rng, stage)
        text = BOS + USER + document.text
        parts: list[tuple[str, float]] = [(text, TEXT_WEIGHT)]
        for index, turn in enumerate(turns):
            said = turn.question if index or not document.text else user_message("", turn.question)
            parts.append((("" if index == 0 else USER) + said + END + ASSISTANT, TEXT_WEIGHT))
            parts.append((f" {turn.answer}{END}", ANSWER_WEIGHT))
        return self._encode(parts, document, turns, len(BOS + USER)).cut(stage.length)

    def _encode(
        self, parts: list[tuple[str, float]], document: Document, turns: list[Question], text_begin: int
    ) -> Example:
        encoding = self._tokenizer.encode("".join(part for part, _ in parts), add_special_tokens=False)
        places = _Places(encoding.offsets)
        tokens = encoding.ids
        example = Example(tokens, [TEXT_WEIGHT] * len(tokens), *([_NOWHERE] * len(tokens) for _ in range(3)))
        begin = len(parts[0][0])
        for index, turn in enumerate(turns):
            asked, answer = parts[1 + 2 * index][0], parts[2 + 2 * index][0]
            first, last = places.span(begin + len(asked), len(answer))
            example.weights[first : last + 1] = [ANSWER_WEIGHT] * (last + 1 - first)
            if turn.sentence:
                value = len(turn.answer.removesuffix("."))
                rows = range(first - 1, places.span(begin + len(asked) + 1, value)[1])
                subject = places.span(begin + asked.rindex(turn.subject), len(turn.subject))
                stands = text_begin + document.text.index(turn.sentence)
                source = places.span(stands + turn.sentence.rindex(turn.answer), value)[0]
                named = places.span(stands + turn.sentence.index(turn.subject), len(turn.subject))
                for place, row in enumerate(rows):
                    self._point(example, row, subject)
                    self._point(example, source + place, named)
                    example.source[row] = source + place
            begin += len(asked) + len(answer)
        return example

    @staticmethod
    def _point(example: Example, row: int, subject: tuple[int, int]) -> None:
        example.subject_begin[row], example.subject_end[row] = subject


class BatchStream:
    """The batch of each step from `first_step` on, or its share of one rank among several. A function of seed and step
    alone."""

    def __init__(self, tokenizer: Tokenizer, plan: Plan, seed: int, first_step: int, share: tuple[int, int]) -> None:
        if not 0 <= seed < HELD_OUT:
            raise ValueError(f"seeds from {HELD_OUT} on are held out")
        self._maker, self._plan, self._seed, self._first_step = ExampleMaker(tokenizer), plan, seed, first_step
        self._rank, self._ranks = share

    def _batch(self, step: int) -> Batch:
        stage = self._plan.stage_at(step)
        rows = max(1, self._plan.batch_tokens // stage.length // self._ranks)
        batch = Batch(
            torch.zeros(rows, stage.length, dtype=torch.long),
            torch.zeros(rows, stage.length),
            *(torch.full((rows, stage.length), _NOWHERE) for _ in range(3)),
        )
        for row in range(rows):
            example = self._maker.make(make_rng(self._seed, step * 65_536 + self._rank * rows + row), stage)
            for name in example.__dataclass_fields__:
                values = torch.tensor(getattr(example, name))
                getattr(batch, name)[row, : len(values)] = values
        return batch

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._first_step, self._plan.steps):
            yield self._batch(step)
