#!/usr/bin/env python3
"""Exact-answer accuracy by length and depth, and perplexity.

    python3 evaluate.py --url http://127.0.0.1:8000 --style plain --lengths 1000 4000 16000 --out DIR
    python3 evaluate.py --backend transformers --folder DIR --style varied --lengths 1000 2000 --perplexity --out DIR

Asks about documents from held-out seeds, greedily, several questions over each document as their shared prefix. Writes
results.json, results.md (a table with 95 % Wilson intervals), results.svg (a heat map) and answers.jsonl (to compare
two runs with diff). With the plain style, made for the constructed model, the http and numpy backends need no
tokenizers library.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from backends import Backend, HttpBackend, NumpyBackend, TransformersBackend
from documents import (
    HELD_OUT,
    Document,
    depth_bands,
    load_counter,
    make_document,
    make_prose,
    make_rng,
    without_needles,
)
from heat_map import heat_map_svg

PROMPT_OVERHEAD = 64  # tokens kept free for question, chat form and answer
UNKNOWN_ANSWERS = {"unknown", "The text does not say"}


@dataclass
class Cell:
    length: int
    depth: float  # middle of the band
    asked: int = 0
    correct: int = 0
    unknown: int = 0  # answered that the text does not say

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked if self.asked else 0.0


def wilson(correct: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion."""
    if asked == 0:
        return 0.0, 1.0
    p, spread = correct / asked, z * z / asked
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / asked + spread / asked / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def normalized(answer: str) -> str:
    return answer.strip().removesuffix(".")


def grade(document: Document, answers: Sequence[str], cells: list[Cell]) -> None:
    """`cells` are those of the document's length, one for each equal band of depth."""
    for question, answer in zip(document.questions, answers):
        cell = cells[min(int(question.depth * len(cells)), len(cells) - 1)]
        cell.asked += 1
        cell.correct += normalized(answer) == normalized(question.answer)
        cell.unknown += normalized(answer) in UNKNOWN_ANSWERS


def evaluate_length(
    backend: Backend, length: int, arguments: argparse.Namespace, answered: list[dict[str, object]]
) -> list[Cell]:
    """Adds to `answered` what was said to each question."""
    bands = depth_bands(arguments.depths)
    cells = [Cell(length, (low + high) / 2) for low, high in bands]
    count = load_counter(arguments.style, arguments.folder)
    each = max(1, arguments.questions // arguments.depths)
    index = 0
    while min(cell.asked for cell in cells) < arguments.per_cell:
        rng = make_rng(HELD_OUT + arguments.seed, index)
        document = make_document(arguments.style, rng, length - PROMPT_OVERHEAD, count, each, bands)
        if arguments.remove_needles:
            document = without_needles(document)
        answers = backend.answer(document.text, [q.question for q in document.questions])
        grade(document, answers, cells)
        for question, answer in zip(document.questions, answers):
            answered.append({"length": length, "document": index, "question": question.question, "answer": answer})
        index += 1
    return cells


def perplexity(backend: Backend, arguments: argparse.Namespace) -> dict[str, float]:
    """Teacher-forced, of held-out prose."""
    count = load_counter("varied", arguments.folder)
    total, tokens = 0.0, 0
    for index in range(arguments.perplexity_documents):
        rng = make_rng(HELD_OUT + arguments.seed, -1 - index)
        loss, scored = backend.negative_log_likelihood(make_prose(rng, arguments.perplexity_tokens, count).text)
        total, tokens = total + loss, tokens + scored
    return {"perplexity": math.exp(total / tokens), "tokens": tokens}


def to_markdown(cells: list[Cell]) -> str:
    depths = sorted({cell.depth for cell in cells})
    lines = [
        "| length | " + " | ".join(f"depth {depth:.0%}" for depth in depths) + " | all |",
        "|---|" + "---|" * (len(depths) + 1),
    ]
    for length in sorted({cell.length for cell in cells}):
        row = [cell for cell in cells if cell.length == length]
        whole = Cell(length, -1.0, sum(c.asked for c in row), sum(c.correct for c in row))
        texts = []
        for cell in (*sorted(row, key=lambda cell: cell.depth), whole):
            low, high = wilson(cell.correct, cell.asked)
            texts.append(f"{cell.accuracy:.1%} [{low:.1%}, {high:.1%}] n={cell.asked}")
        lines.append(f"| {length:,} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def make_backend(arguments: argparse.Namespace) -> Backend:
    if arguments.backend == "http":
        return HttpBackend(arguments.url, arguments.model, arguments.concurrency, json.loads(arguments.extra_body))
    if arguments.folder is None:
        raise SystemExit(f"--backend {arguments.backend} needs --folder")
    if arguments.backend == "numpy":
        return NumpyBackend(arguments.folder)
    return TransformersBackend(arguments.folder, arguments.dtype, arguments.keep_sinks, arguments.keep_recent)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures recall by length and depth.")
    parser.add_argument("--backend", choices=("http", "transformers", "numpy"), default="http")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a running server (http)")
    parser.add_argument("--model", help="name that the server gives the model; default: its first one")
    parser.add_argument("--concurrency", type=int, default=8, help="questions in flight over one document (http)")
    parser.add_argument("--extra-body", default="{}", help='JSON merged into requests, as {"kv_policy": "sparse"}')
    parser.add_argument("--folder", type=Path, help="model folder; the varied style counts tokens with it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(transformers)")
    parser.add_argument("--keep-sinks", type=int, default=4, help="with --keep-recent")
    parser.add_argument("--keep-recent", type=int, help="cut the cache after the document to sinks and this")
    parser.add_argument("--style", choices=("plain", "varied"), default="varied")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--depths", type=int, default=5, help="number of equal bands")
    parser.add_argument("--questions", type=int, default=20, help="per document")
    parser.add_argument("--per-cell", type=int, default=800, help="questions per length and depth, at least")
    parser.add_argument("--remove-needles", action="store_true", help="cut the answers out of the documents")
    parser.add_argument("--perplexity", action="store_true", help="also measure perplexity (transformers)")
    parser.add_argument("--perplexity-documents", type=int, default=16)
    parser.add_argument("--perplexity-tokens", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    backend = make_backend(arguments)
    cells: list[Cell] = []
    answered: list[dict[str, object]] = []
    started = time.monotonic()
    for length in arguments.lengths:
        cells += evaluate_length(backend, length, arguments, answered)
        print(to_markdown(cells[-arguments.depths :]), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results: dict[str, object] = {
        "settings": settings,
        "cells": [
            asdict(cell) | {"accuracy": cell.accuracy, "interval": wilson(cell.correct, cell.asked)} for cell in cells
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    text = to_markdown(cells)
    if arguments.perplexity:
        results["perplexity"] = measured = perplexity(backend, arguments)
        text += f"\nPerplexity on held-out prose: {measured['perplexity']:.3f} over {measured['tokens']:,} tokens.\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answered))
    (arguments.out / "results.md").write_text(text)
    (arguments.out / "results.svg").write_text(heat_map_svg([(c.length, c.depth, c.accuracy) for c in cells]))


if __name__ == "__main__":
    main()
