#!/usr/bin/env python3
"""The constructed recall model: a three-layer Llama whose weights are written down, not trained.

    python3 constructed.py --seed 7 --out DIR

writes a Hugging Face folder in about a second, with the standard library alone. After a document of facts
"... FIRST SECOND MARKER VALUE." and a question that ends with "FIRST SECOND?", the model answers "VALUE.", up to three
words long, or "unknown" where no fact has that key. README.md explains the construction; the seed only shuffles which
code stands for which word and where things lie in the residual stream.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import plain_style
import words
from chat import ASSISTANT, BOS, END, SPECIAL_TOKENS, chat_template
from closed_tokenizer import ClosedTokenizer
from codes import Code, long_codes, short_codes
from llama_folder import Tensor, write_json, write_safetensors

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 256, 3, 4, 2, 64, 128
MAX_POSITIONS = 131_072
ROPE_THETA = 1e12  # pairs 16 and up turn by less than 0.14 radians over MAX_POSITIONS: they carry identities
PAIRS = HEAD_DIM // 2
KEY_PAIRS = range(16, 31)  # first key word in the first half of the head, second key word in the second
PLACE_PAIR = 31  # which word of the value
SINK_PAIR = 15
WORD_BITS, OUTPUT_BITS = 15, 64

# One constant feature so large that RMSNorm divides every token by the same number, to 0.1 %.
CONSTANT = 256.0

# Sum of a_i cos(w_i x) over RoPE pairs 0.. peaks at x = 0 and stays 0.195 below the peak at all other |x| up to
# MAX_POSITIONS; the amplitudes solve that linear program.
STEP_KERNEL = (0.408, 0.077, 0.061, 0.061, 0.059, 0.060, 0.032, 0.041, 0.036, 0.044, 0.033, 0.029, 0.059)
STEP_SHARPNESS = 200.0  # scores are these times the kernel

# Sum of c_i cos(w_i d) + s_i sin(w_i d): at any distance d up to 12 it is 0.067 above its value at every distance from
# d + 3 on, and at least 0.65.
RECENT_KERNEL = (
    (0.002, 0.001), (0.009, -0.019), (0.118, -0.021), (0.116, -0.023), (0.125, -0.025), (0.113, -0.029),
    (0.096, -0.028), (0.079, -0.040), (0.064, -0.028), (0.037, -0.018), (0.035, -0.023), (0.053, -0.036),
    (0.082, -0.060),
)  # fmt: skip
RECENT_SHARPNESS = 560.0

KEY_GAIN, PLACE_GAIN = 7.0, 22.0  # of queries and keys: a full match scores 30 * 7^2 / 8 + 22^2 / 8 = 244.25
SINK_SCORE = 220.0  # the best partial match scores 183.75
IDLE_SCORE = 40.0  # heads without a task look at position 0
ANSWER_GAIN, END_GAIN = 0.5, 64.0  # logits: 32 for the copied token, at most 8 for others, 64 for the end

# Directions for the words of a value and its full stop; inner products of two are 0 or -1.
PLACES: tuple[tuple[int, int], ...] = ((1, 0), (0, 1), (-1, 0), (0, -1))

UNKNOWN = " unknown"
SELF_DESCRIPTION = "What are you: constructed recall model."
FILLER_WORDS = "a I is it was will can do does how many much who where when why please answer question document text"


class Stream:
    """Where each feature lies in the residual stream."""

    def __init__(self, rng: random.Random) -> None:
        free = list(range(HIDDEN))
        rng.shuffle(free)

        def take(count: int) -> list[int]:
            return [free.pop() for _ in range(count)]

        # From the embedding: what the token is.
        self.constant, self.begins, self.marks, self.states, self.asks, self.ends = take(6)
        self.word = take(WORD_BITS)
        self.output = take(OUTPUT_BITS)
        # From layer 0: words one and two back, and how far back a fact's marker or the assistant's turn began.
        self.back = (take(WORD_BITS), take(WORD_BITS))
        self.fact_place, self.answer_place = take(2), take(2)
        # From layer 1: the key before the latest marker. From layer 2: the token to say.
        self.key = (take(WORD_BITS), take(WORD_BITS))
        self.answer = take(OUTPUT_BITS)


def frequency(pair: int) -> float:
    return ROPE_THETA ** (-pair / PAIRS)


def step_kernel(x: int) -> float:
    return sum(a * math.cos(frequency(i) * x) for i, a in enumerate(STEP_KERNEL))


def recent_kernel(distance: int) -> float:
    angles = ((frequency(i) * distance, c, s) for i, (c, s) in enumerate(RECENT_KERNEL))
    return sum(c * math.cos(angle) + s * math.sin(angle) for angle, c, s in angles)


def build_tokenizer() -> ClosedTokenizer:
    listed = []
    for word in (*words.FIRST_WORDS, *words.SECOND_WORDS, *FILLER_WORDS.split(), *plain_style.fixed_words()):
        for spelling in (word, word.capitalize()):
            listed += [f" {spelling}", spelling]
    for word in (*words.MATERIALS, *words.GOODS, *words.PLACES, *words.SIDES, *words.DAYS, *words.MONTHS):
        listed.append(f" {word}")
    listed += [f" {word}" for word in SELF_DESCRIPTION.removesuffix(".").replace(":", "").split()]
    listed += [f" {number}" for number in range(1000)]
    listed.append(UNKNOWN)
    return ClosedTokenizer(SPECIAL_TOKENS, listed)


def assign_words(tokenizer: ClosedTokenizer, rng: random.Random) -> dict[int, Code]:
    """A code for every token but the specials; all first key words differ, and so do all second ones."""
    codes = short_codes()
    by_word: dict[str, Code] = {}
    for key_words in ((*words.FIRST_WORDS, "are"), (*words.SECOND_WORDS, "you")):
        by_word.update(zip(key_words, rng.sample(codes, len(key_words))))
    assigned = {}
    for token in range(len(SPECIAL_TOKENS), len(tokenizer)):
        word = (tokenizer.texts[token] or "").strip().lower()
        fresh = rng.choice(codes)
        assigned[token] = by_word.setdefault(word, fresh) if word else fresh
    return assigned


def build_embedding(
    tokenizer: ClosedTokenizer, stream: Stream, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """The embedding and the language model head."""
    embedding, head = Tensor(len(tokenizer), HIDDEN), Tensor(len(tokenizer), HIDDEN)
    word_codes = assign_words(tokenizer, rng)
    output_codes = dict(zip(word_codes, rng.sample(long_codes(), len(word_codes))))
    for token in range(len(tokenizer)):
        embedding[token, stream.constant] = CONSTANT
    for token, code in word_codes.items():
        for column, sign in zip(stream.word, code):
            embedding[token, column] = sign
        for column, answer, sign in zip(stream.output, stream.answer, output_codes[token]):
            embedding[token, column] = sign
            head[token, answer] = ANSWER_GAIN * sign
    bos, unknown = tokenizer.id(BOS), tokenizer.id(UNKNOWN)
    embedding[bos, stream.begins] = 1
    for column, sign in zip(stream.output, output_codes[unknown]):
        embedding[bos, column] = sign
    for marker in plain_style.MARKERS:
        embedding[tokenizer.id(marker), stream.states] = 1
    for marker in (*plain_style.MARKERS, "?"):
        embedding[tokenizer.id(marker), stream.marks] = 1
    embedding[tokenizer.id(ASSISTANT), stream.asks] = 1
    for token in (tokenizer.id("."), unknown):
        embedding[token, stream.ends] = 1
    head[tokenizer.id(END), stream.ends] = END_GAIN
    return embedding, head


class Attention:
    """The four matrices of one layer, addressed by head and by place in the head."""

    def __init__(self) -> None:
        self.q, self.o = Tensor(HEADS * HEAD_DIM, HIDDEN), Tensor(HIDDEN, HEADS * HEAD_DIM)
        self.k, self.v = Tensor(KV_HEADS * HEAD_DIM, HIDDEN), Tensor(KV_HEADS * HEAD_DIM, HIDDEN)

    def query(self, head: int, place: int, feature: int, gain: float) -> None:
        self.q[head * HEAD_DIM + place, feature] = gain

    def match(self, kv_head: int, place: int, feature: int, gain: float) -> None:
        self.k[kv_head * HEAD_DIM + place, feature] = gain

    def carry(self, kv_head: int, place: int, feature: int) -> None:
        self.v[kv_head * HEAD_DIM + place, feature] = 1

    def write(self, head: int, place: int, feature: int, gain: float) -> None:
        self.o[feature, head * HEAD_DIM + place] = gain

    def idle(self, kv_head: int, stream: Stream) -> None:
        """The heads of this group look at position 0 and write nothing."""
        gain = math.sqrt(IDLE_SCORE * math.sqrt(HEAD_DIM))
        self.match(kv_head, PLACE_PAIR, stream.begins, gain)
        for head in group(kv_head):
            self.query(head, PLACE_PAIR, stream.constant, gain)


def group(kv_head: int) -> range:
    size = HEADS // KV_HEADS
    return range(kv_head * size, (kv_head + 1) * size)


def look_back(stream: Stream) -> Attention:
    """Layer 0: head h attends to the position h + 1 back, by RoPE alone."""
    layer = Attention()
    for kv_head in range(KV_HEADS):
        for pair, amplitude in enumerate(STEP_KERNEL):
            gain = math.sqrt(amplitude * STEP_SHARPNESS * math.sqrt(HEAD_DIM))
            layer.match(kv_head, pair, stream.constant, gain)
            for head in group(kv_head):
                angle = frequency(pair) * (head + 1)
                layer.query(head, pair, stream.constant, gain * math.cos(angle))
                layer.query(head, pair + PAIRS, stream.constant, -gain * math.sin(angle))
        for place, feature in enumerate((*stream.word, stream.states, stream.asks)):
            layer.carry(kv_head, place, feature)
    for head, back in enumerate(stream.back):
        for place, feature in enumerate(back):
            layer.write(head, place, feature, 1)
    for head in range(HEADS):
        for axis in range(2):
            layer.write(head, WORD_BITS, stream.fact_place[axis], PLACES[head][axis])
            if head + 1 < HEADS:  # the first word is said at the assistant's token itself
                layer.write(head, WORD_BITS + 1, stream.answer_place[axis], PLACES[head + 1][axis])
    return layer


def find_key(stream: Stream) -> Attention:
    """Layer 1: the heads of group 0 attend to the latest marker or question mark and fetch the key before it."""
    layer = Attention()
    heads = group(0)
    for pair, (cosine, sine) in enumerate(RECENT_KERNEL):
        scale = RECENT_SHARPNESS * math.sqrt(HEAD_DIM)
        gain = math.sqrt(math.hypot(cosine, sine) * scale)
        layer.match(0, pair, stream.marks, gain)
        for head in heads:
            layer.query(head, pair, stream.constant, cosine * scale / gain)
            layer.query(head, pair + PAIRS, stream.constant, -sine * scale / gain)
    second, first = stream.back
    for place, (source, target) in enumerate(zip((*first, *second), (*stream.key[0], *stream.key[1]))):
        layer.carry(0, place, source)
        for head in heads:
            layer.write(head, place, target, 1 / len(heads))
    layer.idle(1, stream)
    return layer


def retrieve(stream: Stream) -> Attention:
    """Layer 2: the heads of group 0 attend to the word of the same key and place, or to position 0 if there is none."""
    layer = Attention()
    heads = group(0)
    for half, key in enumerate(stream.key):
        for pair, feature in zip(KEY_PAIRS, key):
            layer.match(0, pair + half * PAIRS, feature, KEY_GAIN)
            for head in heads:
                layer.query(head, pair + half * PAIRS, feature, KEY_GAIN)
    sink_gain = math.sqrt(SINK_SCORE * math.sqrt(HEAD_DIM))
    layer.match(0, SINK_PAIR, stream.begins, sink_gain)
    for axis in range(2):
        layer.match(0, PLACE_PAIR + axis * PAIRS, stream.fact_place[axis], PLACE_GAIN)
    for head in heads:
        layer.query(head, SINK_PAIR, stream.constant, sink_gain)
        for axis in range(2):
            layer.query(head, PLACE_PAIR + axis * PAIRS, stream.answer_place[axis], PLACE_GAIN)
            layer.query(head, PLACE_PAIR + axis * PAIRS, stream.asks, PLACE_GAIN * PLACES[0][axis])
    for place, (source, target) in enumerate(zip(stream.output, stream.answer)):
        layer.carry(0, place, source)
        for head in heads:
            layer.write(head, place, target, 1 / len(heads))
    layer.idle(1, stream)
    return layer


def build_norm(stream: Stream) -> Tensor:
    """Undoes the division: every feature comes out as it is, the constant one as 1."""
    scale = CONSTANT / math.sqrt(HIDDEN)
    norm = Tensor.filled(HIDDEN, scale)
    norm[0, stream.constant] = scale / CONSTANT
    return norm


def build_tensors(tokenizer: ClosedTokenizer, rng: random.Random) -> dict[str, Tensor]:
    stream = Stream(rng)
    embedding, head = build_embedding(tokenizer, stream, rng)
    norm = build_norm(stream)
    tensors = {"model.embed_tokens.weight": embedding}
    for index, layer in enumerate((look_back(stream), find_key(stream), retrieve(stream))):
        prefix = f"model.layers.{index}."
        tensors[prefix + "input_layernorm.weight"] = norm
        tensors[prefix + "post_attention_layernorm.weight"] = norm
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(layer, name)
        tensors[prefix + "mlp.gate_proj.weight"] = Tensor(INNER, HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = Tensor(INNER, HIDDEN)
        tensors[prefix + "mlp.down_proj.weight"] = Tensor(HIDDEN, INNER)
    tensors["model.norm.weight"] = norm
    tensors["lm_head.weight"] = head
    return tensors


def write_model(seed: int, folder: Path) -> None:
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", build_tensors(tokenizer, random.Random(seed)))
    bos, end = tokenizer.id(BOS), tokenizer.id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": bos,
        "eos_token_id": end,
    }
    generation = {"bos_token_id": bos, "eos_token_id": end, "do_sample": False}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(SELF_DESCRIPTION),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    write_json(folder / "tokenizer_config.json", settings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the constructed recall model as a Hugging Face folder.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_model(arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
