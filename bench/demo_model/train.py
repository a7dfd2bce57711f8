#!/usr/bin/env python3
"""Trains the demo model and writes it as a Hugging Face folder.

    python3 train.py --out DIR

Uses a CUDA device where there is one, else the CPU. Interrupt it at will: it saves DIR/checkpoint.pt every two minutes
and on SIGINT and SIGTERM, and the same command goes on from there. DIR/log.jsonl gets a line every ten steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from chat import BOS, END
from muon import Muon
from tokenizer import train_tokenizer, write_tokenizer
from torch_llama import Guide, Shape, TorchLlama
from training_data import ANSWER_WEIGHT, CURRICULUM, Batch, BatchStream, Plan

WARMUP_STEPS = 50
DECAY_STEPS = 250
TEXT_SHARE = 0.1  # of tokens outside answers that the loss is taken over
PREVIOUS_ROWS = 32  # of a sequence, where the heads that look one and two back are taught
LOG_EVERY = 20
MAX_POSITIONS = 2 * max(stage.length for stage in CURRICULUM)


def rate_factor(step: int, steps: int) -> float:
    """Of the peak learning rates: linear warm-up, constant, and over the last steps linear decay."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.02, (steps - step) / DECAY_STEPS))


def rows_with_target(targets: torch.Tensor) -> torch.Tensor:
    """Positions with a target, [sequences, count]; sequences with fewer than the most are filled with others."""
    count = max(1, int((targets >= 0).sum(1).max()))
    return targets.sign().clamp(min=-1).topk(count, dim=1).indices


class Trainer:
    def __init__(self, arguments: argparse.Namespace, tokenizer: Tokenizer, share: tuple[int, int]) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rank, self.ranks = share
        self.folder: Path = arguments.out
        self.plan = Plan(CURRICULUM, arguments.batch_tokens)
        torch.manual_seed(arguments.seed)
        shape = Shape(
            vocab=tokenizer.get_vocab_size(), hidden=arguments.hidden, inner=arguments.inner, layers=arguments.layers
        )
        self.tokenizer = tokenizer
        self.model = TorchLlama(shape).to(self.device)
        matrices = [p for p in self.model.model.layers.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() == 1] + [self.model.model.embed_tokens.weight]
        self.optimizers = (
            Muon(matrices, lr=arguments.muon_rate),
            torch.optim.AdamW(others, lr=arguments.peak_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.peaks = (arguments.muon_rate, arguments.peak_rate)
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        self.stops = False

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        names = ("seed", "batch_tokens", "peak_rate", "muon_rate", "guide_weight")
        return {name: getattr(self.arguments, name) for name in names} | self.model.shape.to_dict()

    def save(self) -> None:
        if self.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
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
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def guides(self, batch: Batch) -> dict[int, list[Guide]]:
        """One layer learns to see the words before, a later one whom a value belongs to, a later one the source of an
        answer."""
        rows, length = batch.tokens.shape
        recent = torch.randint(2, length, (rows, PREVIOUS_ROWS), device=self.device)
        about = rows_with_target(batch.subject_end)
        asked = rows_with_target(batch.source)
        source = Guide(0, asked, batch.source.gather(1, asked))
        return {
            0: [Guide(0, recent, recent - 1), Guide(2, recent, recent - 2)],
            2: [
                Guide(0, about, batch.subject_end.gather(1, about)),
                Guide(2, about, batch.subject_begin.gather(1, about)),
            ],
            5: [source, replace(source, head=2)],
        }

    def average_gradients(self) -> None:
        """Over the ranks, which also agree on whether to stop."""
        if self.ranks == 1:
            return
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([float(self.stops)])])
        torch.distributed.all_reduce(flat)
        self.stops = flat[-1].item() > 0
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient) / self.ranks)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """The losses, and the share of answer tokens that were predicted right."""
        factor = rate_factor(self.step, self.plan.steps)
        for optimizer, peak in zip(self.optimizers, self.peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
        is_answer = weights == ANSWER_WEIGHT
        chosen = is_answer | ((weights > 0) & (torch.rand_like(weights) < TEXT_SHARE))
        hidden, guide_losses = self.model(batch.tokens, self.guides(batch))
        logits = self.model.logits(hidden[:, :-1][chosen])
        targets, weights = targets[chosen], weights[chosen]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        guided = torch.stack(guide_losses)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss + self.arguments.guide_weight * guided.sum()).backward()
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        answers = is_answer[chosen]
        right = (logits.detach()[answers].argmax(-1) == targets[answers]).float().mean()
        return {
            "loss": loss.item(),
            "text_loss": losses[~answers].mean().item(),
            "answer_tokens_right": right.item(),
            **{f"guide_{i}": value.item() for i, value in enumerate(guided)},
        }

    def run(self) -> bool:
        """Whether all steps are done."""
        stream = BatchStream(self.tokenizer, self.plan, self.arguments.seed, self.step, (self.rank, self.ranks))
        earlier, started, saved = self.seconds, time.monotonic(), time.monotonic()
        with (self.folder / "log.jsonl").open("a") as log:
            for batch in stream:
                torch.manual_seed(self.arguments.seed + self.step * self.ranks + self.rank)
                measured = self.train_step(batch.to(self.device))
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == self.plan.steps:
                    self.seconds = earlier + time.monotonic() - started
                    line = {
                        "step": self.step,
                        "of": self.plan.steps,
                        "length": batch.tokens.shape[1],
                        **{name: round(value, 4) for name, value in measured.items()},
                        "seconds": round(self.seconds, 1),
                    }
                    if self.rank == 0:
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
        bos, end = self.tokenizer.token_to_id(BOS), self.tokenizer.token_to_id(END)
        config = self.model.shape.to_config(MAX_POSITIONS, bos, end)
        generation = {"bos_token_id": bos, "eos_token_id": end, "do_sample": False}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (self.folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
        weights = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, self.folder / "model.safetensors", metadata={"format": "pt"})


def load_or_train_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    file = arguments.out / "tokenizer.json"
    if not file.exists():
        tokenizer = train_tokenizer(arguments.vocab, arguments.seed, arguments.tokenizer_documents)
        write_tokenizer(tokenizer, MAX_POSITIONS, arguments.out)
    return Tokenizer.from_file(str(file))


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Trains the demo model; the same command resumes an interrupted run.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--peak-rate", type=float, default=4e-3, help="of AdamW: embeddings and norms")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="of Muon: all other matrices")
    parser.add_argument("--guide-weight", type=float, default=0.5, help="of each loss that teaches a head where to look")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokenizer-documents", type=int, default=3000)
    processes = 1 if on_gpu else os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=processes, help="that share each step, a thread each")
    parser.add_argument("--save-seconds", type=float, default=120.0)
    return parser.parse_args()


def train(arguments: argparse.Namespace, tokenizer: Tokenizer, rank: int) -> None:
    torch.set_num_threads(1 if arguments.processes > 1 else os.cpu_count() or 1)
    if arguments.processes > 1:
        meeting = (arguments.out / "meeting").absolute().as_uri()
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=arguments.processes)
    trainer = Trainer(arguments, tokenizer, (rank, arguments.processes))
    trainer.resume()

    def stop(*_: object) -> None:
        trainer.stops = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if trainer.run() and rank == 0:
        trainer.write_folder()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = load_or_train_tokenizer(arguments)
    (arguments.out / "meeting").unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=train, args=(arguments, tokenizer, rank)) for rank in range(1, arguments.processes)]
    for process in others:
        process.start()
    train(arguments, tokenizer, 0)
    for process in others:
        process.join()


if __name__ == "__main__":
    main()
