#!/usr/bin/env python3
"""Trains the demo model and writes it as a Hugging Face folder.

    python3 train.py --out DIR

Uses a CUDA device where there is one, else the CPU. Interrupt it at will: it saves DIR/checkpoint.pt every two minutes
and on SIGINT and SIGTERM, and the same command goes on from there. DIR/log.jsonl gets a line every ten steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from chat import BOS, END
from tokenizer import train_tokenizer, write_tokenizer
from torch_llama import Shape, TorchLlama
from training_data import ANSWER_WEIGHT, CURRICULUM, BatchStream, Plan

WARMUP_STEPS = 100
LOG_EVERY = 10


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix products run faster in it."""
    if device.type == "cuda":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        return time.perf_counter() - started

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine down to a twentieth."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    def __init__(self, arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = fastest_dtype(self.device)
        self.folder: Path = arguments.out
        stages = [stage for stage in CURRICULUM if stage.length <= arguments.max_length]
        total = sum(stage.share for stage in stages)
        self.plan = Plan(stages, round(arguments.tokens / total), arguments.batch_tokens)
        torch.manual_seed(arguments.seed)
        shape = Shape(
            vocab=tokenizer.get_vocab_size(), hidden=arguments.hidden, inner=arguments.inner, layers=arguments.layers
        )
        self.tokenizer = tokenizer
        self.model = TorchLlama(shape).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        self.stops = False

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        names = ("seed", "tokens", "batch_tokens", "max_length", "peak_rate")
        return {name: getattr(self.arguments, name) for name in names} | self.model.shape.to_dict()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "fingerprint": self._fingerprint(),
        }
        unfinished = self.checkpoint.with_suffix(".new")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["fingerprint"] != self._fingerprint():
            raise SystemExit(f"{self.checkpoint} was made with other settings: {state['fingerprint']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted loss, and the share of answer tokens that were predicted right."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.plan.steps, self.arguments.peak_rate)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(tokens[:, :-1], self.plan.stage_at(self.step).rope_theta)
        targets, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
        logits = logits.flatten(0, 1)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        answers = weights == ANSWER_WEIGHT
        right = (logits.detach().argmax(-1) == targets)[answers].float().mean()
        return loss.detach(), right

    def run(self) -> bool:
        """Whether all steps are done."""
        stream = BatchStream(self.folder / "tokenizer.json", self.plan, self.arguments.seed, self.step)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.arguments.workers,
            prefetch_factor=4 if self.arguments.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        earlier, started, saved = self.seconds, time.monotonic(), time.monotonic()
        with (self.folder / "log.jsonl").open("a") as log:
            for tokens, weights in loader:
                place = {"device": self.device, "non_blocking": True}
                loss, right = self.train_step(tokens.to(**place), weights.to(**place))
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == self.plan.steps:
                    self.seconds = earlier + time.monotonic() - started
                    line = {
                        "step": self.step,
                        "of": self.plan.steps,
                        "length": tokens.shape[1],
                        "loss": round(loss.item(), 4),
                        "answer_tokens_right": round(right.item(), 4),
                        "seconds": round(self.seconds, 1),
                    }
                    print(json.dumps(line), flush=True)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if self.stops or time.monotonic() - saved > self.arguments.save_seconds:
                    self.seconds = earlier + time.monotonic() - started
                    self.save()
                    saved = time.monotonic()
                if self.stops:
                    return False
        self.save()
        return True

    def write_folder(self) -> None:
        last = self.plan.stages[-1]
        bos, end = self.tokenizer.token_to_id(BOS), self.tokenizer.token_to_id(END)
        config = self.model.shape.to_config(last.rope_theta, last.length, bos, end)
        generation = {"bos_token_id": bos, "eos_token_id": end, "do_sample": False}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (self.folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        weights = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, self.folder / "model.safetensors", metadata={"format": "pt"})


def load_or_train_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    file = arguments.out / "tokenizer.json"
    if not file.exists():
        tokenizer = train_tokenizer(arguments.vocab, arguments.seed, arguments.tokenizer_documents)
        write_tokenizer(tokenizer, arguments.max_length, arguments.out)
    return Tokenizer.from_file(str(file))


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Trains the demo model; the same command resumes an interrupted run.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=600_000_000 if on_gpu else 80_000_000)
    parser.add_argument("--batch-tokens", type=int, default=131_072 if on_gpu else 32_768)
    parser.add_argument("--max-length", type=int, default=16_384 if on_gpu else 2_048, help="of the last stage")
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokenizer-documents", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1) if on_gpu else 0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch")
    parser.add_argument("--save-seconds", type=float, default=120.0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments, load_or_train_tokenizer(arguments))
    trainer.resume()

    def stop(*_: object) -> None:
        trainer.stops = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if trainer.run():
        trainer.write_folder()


if __name__ == "__main__":
    main()
