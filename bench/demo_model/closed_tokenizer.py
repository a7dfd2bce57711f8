"""A byte-level BPE over a closed list of words: listed words are single tokens, all other text falls into bytes.

There are no merges: `ignore_merges` looks each piece up whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"(<\|\w+\|>)")
_PIECE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def _byte_alphabet() -> list[str]:
    """gpt2's spelling of the 256 bytes."""
    letters, extra = [], 256
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)
        letters.append(chr(byte if printable else extra))
        extra += not printable
    return letters


_ALPHABET = _byte_alphabet()


def _spelling(text: str) -> str:
    return "".join(_ALPHABET[byte] for byte in text.encode())


class ClosedTokenizer:
    def __init__(self, specials: Sequence[str], listed: Iterable[str]) -> None:
        """Ids: the specials, the bytes, then the listed words (with their leading space, if any) in order."""
        self._specials = list(specials)
        self.texts: list[str | None] = [*specials, *([None] * 256)]
        self.first_byte = len(specials)
        self._ids: dict[str, int] = {text: i for i, text in enumerate(specials)}
        for text in listed:
            if len(text.encode()) > 1 and text not in self._ids:
                self._ids[text] = len(self.texts)
                self.texts.append(text)

    def __len__(self) -> int:
        return len(self.texts)

    def id(self, text: str) -> int:
        """Of a special, a listed word or a single byte."""
        return self._ids[text] if text in self._ids else self.first_byte + text.encode()[0]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in self._specials:
                ids.append(self._ids[part])
                continue
            for piece in _PIECE.findall(part):
                known = self._ids.get(piece)
                ids.extend([known] if known is not None else (self.first_byte + byte for byte in piece.encode()))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        pieces = []
        for token in ids:
            text = self.texts[token]
            pieces.append(bytes([token - self.first_byte]) if text is None else text.encode())
        return b"".join(pieces).decode(errors="replace")

    def to_json(self) -> dict[str, object]:
        """tokenizer.json. The first special stands before every text."""
        bos = self._specials[0]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        vocab = {
            text if text in self._specials else _ALPHABET[i - self.first_byte] if text is None else _spelling(text): i
            for i, text in enumerate(self.texts)
        }
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i, text in enumerate(self._specials)
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
            },
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": vocab,
                "merges": [],
            },
        }
