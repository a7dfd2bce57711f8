#!/usr/bin/env python3
"""Trains the byte-level BPE of the trained model on generated documents.

    python3 tokenizer.py --vocab 4096 --seed 1 --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from chat import BOS, END, SPECIAL_TOKENS, chat_template
from documents import make_document, make_rng
from small_talk import SMALL_TALK

_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DOCUMENT_CHARACTERS = 4000
_SMALL_TALK_REPEATS = 20


def sample_texts(seed: int, documents: int) -> Iterator[str]:
    for index in range(documents):
        document = make_document("varied", make_rng(seed, index), _DOCUMENT_CHARACTERS, len, 20)
        yield document.text
        yield from (f"{question.question}\n {question.answer}" for question in document.questions)
    for question, answer in SMALL_TALK * _SMALL_TALK_REPEATS:
        yield f"{question}\n {answer}"


def train_tokenizer(vocab: int, seed: int, documents: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(seed, documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, max_positions: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tokenizer of the trained demo model.")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--max-positions", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.vocab, arguments.seed, arguments.documents)
    write_tokenizer(tokenizer, arguments.max_positions, arguments.out)


if __name__ == "__main__":
    main()
