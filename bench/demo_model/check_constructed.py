#!/usr/bin/env python3
"""Measures that the constructed model does what its construction says, in NumPy, with a BF16 cache.

    python3 check_constructed.py --folder DIR --lengths 1000 4000 16000 100000

Prints the margins of both positional kernels over every distance; then by length: right answers of 20 questions over
the depths, how many of 3 questions without an answer were told so, right answers after the needles were cut out, and
the smallest gap of best to second-best logit. Exits 1 if an answer is wrong.

Past --exact tokens the document's rows of the layers before the last see WINDOW positions only (the questions' rows see
all); the error of that is measured on full rows at ten places.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import accumulate
from pathlib import Path

import numpy as np

import constructed
import plain_style
from backends import NumpyBackend
from chat import BOS
from closed_tokenizer import ClosedTokenizer
from documents import HELD_OUT, Document, depth_bands, load_counter, make_document, make_rng, without_needles
from evaluate import PROMPT_OVERHEAD, normalized

WINDOW = 512
SAMPLES, SAMPLE_ROWS = 10, 128


def kernel_margins() -> tuple[float, float]:
    """In units of scores: the previous-token heads', and the latest-marker heads'."""
    distances = range(constructed.MAX_POSITIONS)
    steps = [constructed.step_kernel(x) for x in distances]
    recent = [constructed.recent_kernel(x) for x in distances]
    beyond = list(accumulate(reversed(recent), max))[::-1]  # the highest from a distance on
    recent_margin = min(recent[distance] - beyond[distance + 3] for distance in range(13))
    return (
        (steps[0] - max(steps[1:])) * constructed.STEP_SHARPNESS,
        recent_margin * constructed.RECENT_SHARPNESS,
    )


def rows_near_markers(tokenizer: ClosedTokenizer, tokens: list[int]) -> np.ndarray:
    """True where a marker stands 1 to 12 positions back: all rows that can be retrieved are among these."""
    marks = np.isin(tokens, [tokenizer.id(marker) for marker in plain_style.MARKERS])
    near = np.zeros(len(tokens), bool)
    for distance in range(1, 13):
        near[distance:] |= marks[:-distance]
    return near


def window_error(backend: NumpyBackend, tokenizer: ClosedTokenizer, tokens: list[int]) -> float:
    """Largest difference of a cached key or value between windowed and full rows, at places over the document. Of the
    last layer only rows near markers count: others blend older keys, differently so, and have no place in a value."""
    model = backend.model
    layers = range(constructed.LAYERS)
    near = rows_near_markers(tokenizer, tokens)
    model.window = WINDOW
    model.length = 0
    model.forward(tokens)
    windowed = [model.cache(layer).copy() for layer in layers]
    model.window = None
    worst = 0.0
    for begin in np.linspace(WINDOW, len(tokens) - SAMPLE_ROWS, SAMPLES, dtype=int):
        model.length = begin
        model.forward(tokens[begin : begin + SAMPLE_ROWS])
        rows = np.arange(begin, begin + SAMPLE_ROWS)
        for layer in layers:
            counted = rows[near[rows]] if layer == layers[-1] else rows
            difference = windowed[layer][:, :, counted] - model.cache(layer)[:, :, counted]
            worst = max(worst, float(np.abs(difference).max(initial=0.0)))
    return worst


def count_right(backend: NumpyBackend, document: Document) -> tuple[int, int, int]:
    """Questions that the document answers: answered rightly, and not so; others: told that it does not."""
    right = wrong = told = 0
    answers = backend.answer(document.text, [question.question for question in document.questions])
    for question, answer in zip(document.questions, answers):
        is_right = normalized(answer) == normalized(question.answer)
        if question.sentence:
            right, wrong = right + is_right, wrong + (not is_right)
        else:
            told += is_right
    return right, wrong, told


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the constructed recall model.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--exact", type=int, default=16_000, help="longer documents are prefilled with a window")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    step_margin, recent_margin = kernel_margins()
    print(f"previous-token margin {step_margin:.1f}, latest-marker margin {recent_margin:.1f} (log of 131,072: 11.8)")
    backend = NumpyBackend(arguments.folder)
    tokenizer = constructed.build_tokenizer()
    count = load_counter("plain", None)
    is_good = True
    for length in arguments.lengths:
        started = time.monotonic()
        backend.margins.clear()
        rng = make_rng(HELD_OUT + arguments.seed, length)
        room = length - PROMPT_OVERHEAD
        document = make_document("plain", rng, room, count, 4, depth_bands(5), unknown=3)
        prefill = "full"
        if length > arguments.exact:
            error = window_error(backend, tokenizer, tokenizer.encode(BOS + document.text))
            prefill = f"windowed, error {error:.1e}"
        backend.windowed_prefill = WINDOW if length > arguments.exact else None
        right, wrong, told = count_right(backend, document)
        margin = min(backend.margins)
        left, _, _ = count_right(backend, without_needles(document))
        print(
            f"{length} tokens: {right} of {right + wrong} right, {told} of 3 unknown told so, smallest logit gap "
            f"{margin:.2f}; without needles {left} right; prefill {prefill}; {time.monotonic() - started:.0f} s",
            flush=True,
        )
        is_good = is_good and wrong == 0 and told == 3 and left == 0
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
