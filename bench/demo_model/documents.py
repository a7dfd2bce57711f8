#!/usr/bin/env python3
"""Recall documents: facts among noise, with questions about facts at chosen depths.

    python3 documents.py --style plain --tokens 16000 --documents 2 --seed 1 --out documents.jsonl
    python3 documents.py --style varied --tokenizer DIR --tokens 2000 --split held-out --out documents.jsonl
    python3 documents.py --style varied --tokenizer DIR --tokens 2000 --prose --out prose.jsonl

One JSON object a line: {"text", "tokens", "questions": [{"question", "answer", "depth", "sentence"}, ...], "before",
"after"}; before + question + after is the prompt that the chat template makes. Everything follows from the seed.
Training uses seeds below HELD_OUT, evaluation seeds from there on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from chat import prompt_around_question
from constructed import SELF_DESCRIPTION, build_tokenizer
from facts import Fact, Style
from plain_style import PlainStyle
from varied_style import VariedStyle

HELD_OUT = 1 << 40
STYLES: dict[str, Callable[[random.Random], Style]] = {"plain": PlainStyle, "varied": VariedStyle}
TokenCounter = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    depth: float  # of its sentence: 0 at the begin of the document, 1 at the end
    sentence: str  # what answers it; empty where nothing does
    subject: str = ""  # what it is about, where the style tells


@dataclass(frozen=True)
class Document:
    text: str
    tokens: int
    questions: list[Question]


@dataclass(frozen=True)
class _Placed:
    fact: Fact
    depth: float


def make_rng(seed: int, index: int) -> random.Random:
    return random.Random(f"{seed}/{index}")


def _write_text(style: Style, rng: random.Random, tokens: int, count: TokenCounter) -> tuple[str, int, list[_Placed]]:
    """Sentences of at most `tokens` tokens, short of it by less than a sentence, and the facts among them."""
    density = rng.uniform(0.6, 1.0)
    pieces: list[str] = []
    facts: list[tuple[Fact, int]] = []
    total = 0
    while True:
        fact = style.fact() if not pieces or rng.random() < density else None
        separator = rng.choice(("\n", " ", " ")) if pieces else ""
        piece = separator + (fact.sentence if fact else style.noise())
        length = count(piece)
        if total + length > tokens:
            break
        if fact:
            facts.append((fact, total))
        pieces.append(piece)
        total += length
    return "".join(pieces), total, [_Placed(fact, begin / max(total, 1)) for fact, begin in facts]


def _pick(
    rng: random.Random, facts: Sequence[_Placed], bands: Sequence[tuple[float, float]], each: int
) -> list[_Placed]:
    """`each` facts from every band of depths, or all that a band has."""
    picked = []
    for low, high in bands:
        inside = [placed for placed in facts if low <= placed.depth < high]
        picked += rng.sample(inside, min(each, len(inside)))
    return picked


def depth_bands(count: int) -> list[tuple[float, float]]:
    return [(i / count, (i + 1) / count) for i in range(count)]


def make_document(
    style_name: str,
    rng: random.Random,
    tokens: int,
    count: TokenCounter,
    questions_per_band: int,
    bands: Sequence[tuple[float, float]] = ((0.0, 1.0),),
    unknown: int = 0,
) -> Document:
    """`unknown` further questions have no answer in the text."""
    style = STYLES[style_name](rng)
    text, total, facts = _write_text(style, rng, tokens, count)
    questions = [
        Question(
            placed.fact.question, placed.fact.answer, placed.depth, placed.fact.sentence, placed.fact.subject
        )
        for placed in _pick(rng, facts, bands, questions_per_band)
    ]
    for _ in range(unknown):
        fact = style.unknown_question()
        questions.append(Question(fact.question, fact.answer, -1.0, ""))
    return Document(text, total, questions)


def without_needles(document: Document) -> Document:
    """The same questions after every sentence that answers one of them was cut out."""
    text = document.text
    for question in document.questions:
        if question.sentence:
            text = text.replace(question.sentence, "", 1)
    return Document(text, document.tokens, document.questions)


def make_prose(rng: random.Random, tokens: int, count: TokenCounter) -> Document:
    """Running text of the varied style without questions, for perplexity."""
    text, total, _ = _write_text(VariedStyle(rng), rng, tokens, count)
    return Document(text, total, [])


def load_counter(style_name: str, tokenizer: Path | None) -> TokenCounter:
    if tokenizer is None and style_name == "plain":
        closed = build_tokenizer()
        return lambda text: len(closed.encode(text))
    if tokenizer is None:
        raise SystemExit("--style varied needs --tokenizer, a folder with tokenizer.json, to count tokens")
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes recall documents and questions as JSON lines.")
    parser.add_argument("--style", choices=sorted(STYLES), default="plain")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; the plain style has its own")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--questions", type=int, default=20, help="per document, spread evenly over the depths")
    parser.add_argument("--depths", type=int, default=5, help="number of equal bands of depth")
    parser.add_argument("--unknown", type=int, default=0, help="further questions without an answer")
    parser.add_argument("--remove-needles", action="store_true", help="cut out the sentences that hold the answers")
    parser.add_argument("--prose", action="store_true", help="text without questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=("train", "held-out"), default="held-out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    count = load_counter(arguments.style, arguments.tokenizer)
    seed = arguments.seed + (HELD_OUT if arguments.split == "held-out" else 0)
    system = SELF_DESCRIPTION if arguments.style == "plain" else ""
    with arguments.out.open("w", encoding="utf-8") as file:
        for index in range(arguments.documents):
            rng = make_rng(seed, index)
            if arguments.prose:
                document = make_prose(rng, arguments.tokens, count)
            else:
                each = -(-arguments.questions // arguments.depths)
                bands = depth_bands(arguments.depths)
                document = make_document(
                    arguments.style, rng, arguments.tokens, count, each, bands, arguments.unknown
                )
            if arguments.remove_needles:
                document = without_needles(document)
            before, after = prompt_around_question(document.text, system)
            line = asdict(document) | {"before": before, "after": after}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
