"""Batches for the trainer: documents followed by many questions and their answers, in chat form."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from chat import ASSISTANT, BOS, END, USER, user_message
from documents import HELD_OUT, make_document, make_rng
from varied_style import SMALL_TALK

ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.1
_TURN_TOKENS = 27  # of a question with its answer, about
_SMALL_TALK_SHARE = 0.04


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    length: int  # tokens of a sequence
    share: float  # of all training tokens
    rope_theta: float
    max_questions: int


CURRICULUM: tuple[Stage, ...] = (
    Stage(128, 0.10, 1e4, 8),
    Stage(256, 0.20, 1e4, 12),
    Stage(512, 0.22, 1e4, 20),
    Stage(1024, 0.15, 1e5, 28),
    Stage(2048, 0.12, 1e5, 40),
    Stage(4096, 0.08, 5e5, 56),
    Stage(8192, 0.06, 5e5, 72),
    Stage(16384, 0.07, 5e5, 96),
)


@dataclass(frozen=True)
class Plan:
    """Which stage each step belongs to."""

    stages: Sequence[Stage]
    tokens: int
    batch_tokens: int

    def steps_of(self, stage: Stage) -> int:
        return max(1, round(self.tokens * stage.share / self.batch_tokens))

    @property
    def steps(self) -> int:
        return sum(self.steps_of(stage) for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < self.steps_of(stage):
                return stage
            step -= self.steps_of(stage)
        return self.stages[-1]


class ExampleMaker:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _turns(self, rng: random.Random, stage: Stage) -> list[tuple[str, str]]:
        """What the user says and what the assistant answers."""
        if rng.random() < _SMALL_TALK_SHARE:
            return rng.sample(SMALL_TALK, rng.randint(1, 4))
        asked = min(stage.max_questions, max(1, round(stage.length * rng.uniform(0.3, 0.6) / _TURN_TOKENS)))
        room = stage.length - asked * _TURN_TOKENS
        unknown = sum(rng.random() < 0.05 for _ in range(asked))
        document = make_document(
            "varied", rng, room, lambda text: len(self._encode(text)), asked - unknown, unknown=unknown
        )
        turns = [(question.question, question.answer) for question in document.questions]
        rng.shuffle(turns)
        return [(user_message(document.text, turns[0][0]), turns[0][1]), *turns[1:]] if turns else []

    def make(self, rng: random.Random, stage: Stage) -> tuple[list[int], list[float]]:
        """Tokens, and the weight of the loss of predicting each; cut to the stage's length."""
        tokens, weights = self._encode(BOS), [0.0]
        for said, answer in self._turns(rng, stage):
            for text, weight in ((f"{USER}{said}{END}{ASSISTANT}", TEXT_WEIGHT), (f" {answer}{END}", ANSWER_WEIGHT)):
                ids = self._encode(text)
                tokens += ids
                weights += [weight] * len(ids)
        return tokens[: stage.length], weights[: stage.length]


class BatchStream(IterableDataset):
    """The batch of each step from `first_step` on: tokens [rows, length] and weights alike. A function of seed and step
    alone, however many workers make it."""

    def __init__(self, tokenizer_file: Path, plan: Plan, seed: int, first_step: int) -> None:
        super().__init__()
        if not 0 <= seed < HELD_OUT:
            raise ValueError(f"seeds from {HELD_OUT} on are held out")
        self._tokenizer_file, self._plan, self._seed, self._first_step = tokenizer_file, plan, seed, first_step

    def _batch(self, maker: ExampleMaker, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        stage = self._plan.stage_at(step)
        rows = max(1, self._plan.batch_tokens // stage.length)
        tokens, weights = torch.zeros(rows, stage.length, dtype=torch.long), torch.zeros(rows, stage.length)
        for row in range(rows):
            ids, loss_weights = maker.make(make_rng(self._seed, step * 65_536 + row), stage)
            tokens[row, : len(ids)] = torch.tensor(ids)
            weights[row, : len(ids)] = torch.tensor(loss_weights)
        return tokens, weights

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        begin, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        maker = ExampleMaker(Tokenizer.from_file(str(self._tokenizer_file)))
        for step in range(self._first_step + begin, self._plan.steps, stride):
            yield self._batch(maker, step)
