"""Who answers: a running server, transformers, or NumPy."""

from __future__ import annotations

import abc
import json
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chat import END, prompt_around_question, user_message
from constructed import SELF_DESCRIPTION, build_tokenizer

MAX_ANSWER_TOKENS = 48
_SPLIT = "\N{SYMBOL FOR UNIT SEPARATOR}"  # stands for the question while a prompt is cut around it


class Backend(abc.ABC):
    @abc.abstractmethod
    def answer(self, document: str, questions: Sequence[str]) -> list[str]:
        """Greedy answers, each asked alone after the document."""

    def negative_log_likelihood(self, text: str) -> tuple[float, int]:
        """Summed over the tokens of the text after the first, and their number."""
        raise SystemExit("perplexity needs --backend transformers")


class HttpBackend(Backend):
    """An OpenAI-compatible server; its own chat template applies."""

    def __init__(self, url: str, model: str | None, concurrency: int, extra_body: Mapping[str, Any]) -> None:
        self._url = url.rstrip("/")
        self._concurrency = concurrency
        self._extra_body = extra_body
        self._model = model or self._request("/v1/models", None)["data"][0]["id"]

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as response:
            return json.load(response)

    def _ask(self, document: str, question: str) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": user_message(document, question)}],
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
            **self._extra_body,
        }
        return self._request("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def answer(self, document: str, questions: Sequence[str]) -> list[str]:
        """The first question alone: it leaves the document in the prefix cache for the others."""
        if not questions:
            return []
        first = self._ask(document, questions[0])
        with ThreadPoolExecutor(self._concurrency) as pool:
            return [first, *pool.map(lambda question: self._ask(document, question), questions[1:])]


class TransformersBackend(Backend):
    def __init__(self, folder: Path, dtype: str, keep_sinks: int, keep_recent: int | None) -> None:
        """With `keep_recent`, the cache keeps that many latest tokens of each document, and `keep_sinks` first ones."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(self._device).eval()
        self._keep_sinks, self._keep_recent = keep_sinks, keep_recent

    def _encode(self, text: str) -> Any:
        return self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(self._device)

    def _forward(self, ids: Any, begin: int, cache: Any) -> Any:
        """Logits after the last of `ids`, which stand at positions from `begin` on."""
        positions = self._torch.arange(begin, begin + ids.shape[1], device=self._device)[None]
        output = self._model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]

    def _cut(self, cache: Any) -> None:
        recent = self._keep_recent
        if recent is None or cache.get_seq_length() <= self._keep_sinks + recent:
            return
        for layer in cache.layers:
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                parts = (whole[:, :, : self._keep_sinks], whole[:, :, -recent:])
                setattr(layer, name, self._torch.cat(parts, dim=2))

    def answer(self, document: str, questions: Sequence[str]) -> list[str]:
        from transformers import DynamicCache

        messages = [{"role": "user", "content": user_message(document, _SPLIT)}]
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = prompt.split(_SPLIT)
        answers = []
        with self._torch.inference_mode():
            cache = DynamicCache()
            prefix = self._encode(before)
            self._forward(prefix, 0, cache)
            self._cut(cache)
            kept = cache.get_seq_length()
            for question in questions:
                if cache.get_seq_length() > kept:
                    cache.crop(kept - cache.get_seq_length())
                answers.append(self._generate(self._encode(question + after), prefix.shape[1], cache))
        return answers

    def _generate(self, ids: Any, begin: int, cache: Any) -> str:
        generated: list[int] = []
        for _ in range(MAX_ANSWER_TOKENS):
            token = int(self._forward(ids, begin, cache).argmax())
            if token == self._tokenizer.eos_token_id:
                break
            generated.append(token)
            begin += ids.shape[1]
            ids = self._torch.tensor([[token]], device=self._device)
        return self._tokenizer.decode(generated, skip_special_tokens=True)

    def negative_log_likelihood(self, text: str) -> tuple[float, int]:
        with self._torch.inference_mode():
            ids = self._tokenizer(text, return_tensors="pt").input_ids.to(self._device)
            logits = self._model(ids).logits[0, :-1].float()
            loss = self._torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        return float(loss), ids.shape[1] - 1


class NumpyBackend(Backend):
    """The constructed model alone, whose tokenizer needs no library."""

    def __init__(self, folder: Path) -> None:
        from numpy_llama import NumpyLlama

        self._tokenizer = build_tokenizer()
        self.model = NumpyLlama(folder, bf16=True)
        self.windowed_prefill: int | None = None  # for documents; questions and answers see all
        self.margins: list[float] = []  # best logit less second best, for every token generated

    def answer(self, document: str, questions: Sequence[str]) -> list[str]:
        before, after = prompt_around_question(document, SELF_DESCRIPTION)
        self.model.length = 0
        self.model.window = self.windowed_prefill
        self.model.forward(self._tokenizer.encode(before))
        self.model.window = None
        kept = self.model.length
        answers = []
        for question in questions:
            self.model.length = kept
            answers.append(self._generate(self._tokenizer.encode(question + after)))
        return answers

    def _generate(self, ids: list[int]) -> str:
        generated: list[int] = []
        for _ in range(MAX_ANSWER_TOKENS):
            logits = self.model.forward(ids)
            second, best = sorted(logits.tolist())[-2:]
            self.margins.append(best - second)
            token = int(logits.argmax())
            if token == self._tokenizer.id(END):
                break
            generated.append(token)
            ids = [token]
        return self._tokenizer.decode(generated)
