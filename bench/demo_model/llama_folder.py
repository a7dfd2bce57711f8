"""Writes a Llama checkpoint as a Hugging Face folder with the standard library alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path


def round_to_bf16(value: float) -> int:
    """The upper half of the nearest float32 with a short significand, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


class Tensor:
    """A BF16 matrix or vector, zero where nothing was set."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.columns = shape[-1]
        count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
        self.data = bytearray(2 * count)

    def __setitem__(self, place: tuple[int, int], value: float) -> None:
        row, column = place
        struct.pack_into("<H", self.data, 2 * (row * self.columns + column), round_to_bf16(value))

    @classmethod
    def filled(cls, size: int, value: float) -> Tensor:
        tensor = cls(size)
        tensor.data = bytearray(struct.pack("<H", round_to_bf16(value)) * size)
        return tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
