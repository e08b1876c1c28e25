"""The encoder-decoder with PyTorch and Hugging Face transformers, for `experiments.benchmarks.generators`.

Run by the Python that has both installed. Every line on stdin is a JSON object, `{"do": NAME, ...}` with the keyword
arguments of the function of that name in `Peer`; a JSON object comes back. Arrays come and go as files of numpy.

The model is T5 with the sizes asked for and a gated SiLU, one vocabulary in which token 0 pads and begins, and the
codes of level `l` follow those of level `l - 1`. An item is as many tokens as it has codes, and there is no end token.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

# Settings equal to semid's training: AdamW, warm-up, cosine decay, gradient clipping.
_BETAS, _DECAY, _WARMUP, _FINAL, _CLIP = (0.9, 0.98), 0.01, 0.05, 0.02, 1.0


class Prefixes:
    """The distinct prefixes of a catalogue's codes as sorted 64-bit keys: the successors of a prefix are a range."""

    def __init__(self, codes: np.ndarray, level_sizes: tuple[int, ...]) -> None:
        self.level_sizes = level_sizes
        self.offsets = np.cumsum([1, *level_sizes[:-1]])
        self.keys: list[np.ndarray] = []
        key = np.zeros(len(codes), np.int64)
        for level, size in enumerate(level_sizes):
            key = key * size + codes[:, level]
            self.keys.append(np.unique(key))
        self.order = np.argsort(key, kind="stable")
        self.items = key[self.order]
        children = [
            np.unique(keys // size, return_counts=True)[1] for keys, size in zip(self.keys, level_sizes, strict=True)
        ]
        self.widest = [int(counts.max()) for counts in children]
        self.tensors = [torch.from_numpy(keys) for keys in self.keys]

    def follow(self, tokens: list[int]) -> list[int]:
        """The tokens that may follow those of a prefix, by binary search: for `prefix_allowed_tokens_fn`."""
        level, key = len(tokens), 0
        if level == len(self.level_sizes):
            return [0]
        for at, token in enumerate(tokens):
            key = key * self.level_sizes[at] + token - int(self.offsets[at])
        size, keys = self.level_sizes[level], self.keys[level]
        start, end = np.searchsorted(keys, (key * size, (key + 1) * size))
        return (keys[start:end] - key * size + self.offsets[level]).tolist()

    def allowed(self, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Masks [n, vocabulary] of these tokens for all prefixes [n, level] at once."""
        level, key = tokens.shape[1], torch.zeros(len(tokens), dtype=torch.int64)
        for at in range(level):
            code = tokens[:, at] - int(self.offsets[at])
            key = key * self.level_sizes[at] + code.clamp(0, self.level_sizes[at] - 1)
        size, keys = self.level_sizes[level], self.tensors[level]
        start, end = torch.searchsorted(keys, key * size), torch.searchsorted(keys, (key + 1) * size)
        index = start[:, None] + torch.arange(self.widest[level])
        inside = index < end[:, None]
        found = keys[index.clamp(max=len(keys) - 1)] - key[:, None] * size + int(self.offsets[level])
        mask = torch.zeros(len(tokens), vocabulary + 1, dtype=torch.bool)  # the last column absorbs padding
        return mask.scatter_(1, torch.where(inside, found, vocabulary), True)[:, :vocabulary]

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """An item row for the tokens [..., level] of each item, -1 where there is no such item."""
        key = np.zeros(tokens.shape[:-1], np.int64)
        exists = np.ones(tokens.shape[:-1], bool)
        for level, (offset, size) in enumerate(zip(self.offsets, self.level_sizes, strict=True)):
            code = tokens[..., level] - offset
            exists &= (code >= 0) & (code < size)
            key = key * size + np.clip(code, 0, size - 1)
        at = np.searchsorted(self.items, key).clip(max=len(self.items) - 1)
        return np.where(exists & (self.items[at] == key), self.order[at], -1)


def trie(codes: np.ndarray, offsets: np.ndarray) -> dict[int, dict]:
    """Tokens of the items as nested dicts: the trie that is usually written for `prefix_allowed_tokens_fn`."""
    root: dict[int, dict] = {}
    for tokens in (codes + offsets).tolist():
        node = root
        for token in tokens:
            node = node.setdefault(token, {})
    return root


class Mask(LogitsProcessor):
    """Allowed next tokens of all beams at once, which `prefix_allowed_tokens_fn` finds beam by beam in Python."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes = prefixes

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~self.prefixes.allowed(input_ids[:, 1:], scores.shape[1]), -math.inf)


class Peer:
    """Commands of the benchmark. There is one model at a time of each name, and one catalogue."""

    def __init__(self) -> None:
        self.models: dict[str, Training] = {}
        self.prefixes: Prefixes | None = None
        self.codes = np.zeros((0, 0), np.int64)
        self.level_sizes: tuple[int, ...] = ()

    def versions(self) -> dict[str, Any]:
        names = {"torch": torch.__version__, "transformers": transformers.__version__}
        return names | {"threads": torch.get_num_threads()}

    def catalogue(self, file: str, level_sizes: list[int], search: bool = True) -> dict[str, float]:
        """Codes [items, level] from a file of numpy; with `search` the seconds that their prefixes took."""
        self.codes, self.level_sizes = np.load(file), tuple(level_sizes)
        started = time.perf_counter()
        self.prefixes = Prefixes(self.codes, self.level_sizes) if search else None
        return {"seconds": time.perf_counter() - started}

    def model(
        self, name: str, backbone: dict, decoder_layers: int, compiled: bool = False, **schedule: Any
    ) -> dict[str, int]:
        """A new model for the catalogue's codes, and its optimizer."""
        torch.manual_seed(0)
        self.models[name] = Training(self.level_sizes, backbone, decoder_layers, compiled, **schedule)
        return {"parameters": sum(p.numel() for p in self.models[name].model.parameters())}

    def examples(self, file: str, names: list[str]) -> dict[str, int]:
        """Training examples for the models named: `history` [n, items] of item rows, `real` of it, `targets` [n]; and,
        if they are to be taken in another order than a fresh permutation each epoch, their numbers in that `order`."""
        with np.load(file) as arrays:
            data = {name: arrays[name] for name in arrays.files}
        for name in names:
            self.models[name].data = data
        return {"examples": len(data["targets"])}

    def steps(self, name: str, batch: int, steps: int) -> dict[str, float]:
        """Training steps; seconds of all and of the median one, and the last loss."""
        training, seconds, loss = self.models[name], [], math.nan
        training.model.train()
        for _ in range(steps):
            started = time.perf_counter()
            loss = training.step(self.codes, batch)
            seconds.append(time.perf_counter() - started)
        return {"seconds": sum(seconds), "median": statistics.median(seconds), "loss": float(loss)}

    def matmul(self, rows: int, inner: int, columns: int, repeats: int) -> dict[str, float]:
        """Products of two matrices."""
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        return {"seconds": time.perf_counter() - started}

    def search(
        self, name: str, file: str, out: str, beam_size: int, results: int, at_once: int, constraint: str
    ) -> dict[str, float]:
        """Item rows [users, results] of `generate` for the `history` and `real` of a file, -1 where no item.

        `constraint` is none, `trie` or `sorted` (both a `prefix_allowed_tokens_fn`), or `mask` (all beams at once).
        """
        training, prefixes = self.models[name], self._prefixes()
        training.model.eval()
        options = dict(self._constraint(constraint))
        with np.load(file) as arrays:
            history, real = arrays["history"], arrays["real"]
        found = []
        started = time.perf_counter()
        for at in range(0, len(history), at_once):
            tokens, mask = training.tokens(self.codes, history[at : at + at_once], real[at : at + at_once])
            with torch.inference_mode():
                sequences = training.model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    num_beams=beam_size,
                    num_return_sequences=results,
                    max_new_tokens=len(self.level_sizes),
                    do_sample=False,
                    **options,
                )
            rows = prefixes.rows(sequences[:, 1:].numpy())
            found.append(rows.reshape(-1, results))
        seconds = time.perf_counter() - started
        np.save(out, np.concatenate(found).astype(np.int32))
        return {"seconds": seconds}

    def save(self, name: str, file: str) -> dict[str, int]:
        """The state of a training, whole or not at all."""
        training, partial = self.models[name], Path(f"{file}.partial")
        torch.save(training.state(), partial)
        partial.replace(file)
        return {"step": training.number}

    def restore(self, name: str, file: str) -> dict[str, int]:
        self.models[name].load(torch.load(file, weights_only=True))
        return {"step": self.models[name].number}

    def _prefixes(self) -> Prefixes:
        if self.prefixes is None:
            raise ValueError("the catalogue was not prepared for search")
        return self.prefixes

    def _constraint(self, name: str) -> Iterator[tuple[str, Any]]:
        """The options of `generate` that put a constraint on it."""
        prefixes = self._prefixes()
        if name == "mask":
            yield "logits_processor", LogitsProcessorList([Mask(prefixes)])
        elif name == "sorted":
            yield "prefix_allowed_tokens_fn", lambda batch, tokens: prefixes.follow(tokens.tolist()[1:])
        elif name == "trie":
            yield "prefix_allowed_tokens_fn", _through(trie(self.codes, prefixes.offsets))


def _through(root: dict[int, dict]) -> Callable[[int, torch.Tensor], list[int]]:
    def follow(batch: int, tokens: torch.Tensor) -> list[int]:
        node = root
        for token in tokens.tolist()[1:]:
            node = node[token]
        return list(node) or [0]

    return follow


class Training:
    """A T5, its optimizer, and its position in the data."""

    def __init__(
        self,
        level_sizes: tuple[int, ...],
        backbone: dict,
        decoder_layers: int,
        compiled: bool,
        learning_rate: float = 3e-3,
        num_steps: int = 10_000,
        accumulate: int = 1,
    ) -> None:
        self.accumulate = accumulate
        self.offsets = np.cumsum([1, *level_sizes[:-1]])
        self.data: dict[str, np.ndarray] = {}
        self.number, self.num_steps = 0, num_steps
        config = T5Config(
            vocab_size=1 + sum(level_sizes),
            d_model=backbone["dim"],
            d_kv=backbone["dim"] // backbone["heads"],
            d_ff=backbone["hidden"],
            num_layers=backbone["layers"],
            num_decoder_layers=decoder_layers,
            num_heads=backbone["heads"],
            dropout_rate=backbone["dropout"],
            feed_forward_proj="gated-silu",
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=None,
        )
        self.model = T5ForConditionalGeneration(config)
        self.forward = torch.compile(self.model) if compiled else self.model
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=_BETAS, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Share of the peak: a linear rise from 0, then half a cosine."""
        rise = round(_WARMUP * self.num_steps)
        if step < rise:
            return step / rise
        done = min((step - rise) / max(self.num_steps - rise, 1), 1.0)
        return _FINAL + (1 - _FINAL) * (1 + math.cos(math.pi * done)) / 2

    def step(self, codes: np.ndarray, batch: int) -> torch.Tensor:
        """A training step on the next examples, in microbatches."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for rows in np.array_split(self._rows(batch), self.accumulate):
            tokens, mask = self.tokens(codes, self.data["history"][rows], self.data["real"][rows])
            labels = torch.from_numpy(codes[self.data["targets"][rows]] + self.offsets)
            loss = self.forward(input_ids=tokens, attention_mask=mask, labels=labels).loss * (len(rows) / batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.number += 1
        return total

    def tokens(self, codes: np.ndarray, history: np.ndarray, real: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and attention mask [users, items x levels], cut to the longest history, as a collator does."""
        longest = int(real.sum(axis=1).max())
        history, real = history[:, :longest], real[:, :longest]
        tokens = np.where(real[..., None], codes[history] + self.offsets, 0)
        mask = np.repeat(real, codes.shape[1], axis=1)
        return torch.from_numpy(tokens.reshape(len(tokens), -1)), torch.from_numpy(mask.astype(np.int64))

    def _rows(self, batch: int) -> np.ndarray:
        """The batch that semid takes at this step: batches run on across epochs."""
        numbers = np.arange(self.number * batch, (self.number + 1) * batch)
        if "order" in self.data:
            return self.data["order"][numbers]
        epoch, within = np.divmod(numbers, len(self.data["targets"]))
        orders = {
            int(e): np.random.default_rng([0, e]).permutation(len(self.data["targets"])) for e in np.unique(epoch)
        }
        return np.concatenate([orders[e][within[epoch == e]] for e in orders])

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()} | {"number": self.number}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.number = state["number"]


def main() -> None:
    peer = Peer()
    known = {
        function.__name__: function
        for function in (
            peer.versions,
            peer.catalogue,
            peer.model,
            peer.examples,
            peer.steps,
            peer.matmul,
            peer.search,
            peer.save,
            peer.restore,
        )
    }
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(known[question.pop("do")](**question)), flush=True)


if __name__ == "__main__":
    main()
