"""How well a model predicts a text, and whether reading it at once and token by token agree."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers.models import LanguageModel

# Training characters read before the held-out part, as the n-gram models have some; they are not scored.
LEAD = 1024
CHUNK = 2048


@torch.no_grad()
def bits_per_character(model: LanguageModel, train: Tensor, held_out: Tensor) -> float:
    """Mean bits over all of held_out, int64 [characters], read from first to last with the state carried along."""
    device = model.embedding.weight.device
    lead = train[-LEAD:]
    text = torch.cat([lead, held_out]).to(device)
    bits, state = 0.0, None
    with evaluating(model):
        for start in range(0, len(text) - 1, CHUNK):
            targets = text[start + 1 : start + 1 + CHUNK]
            logits, state = model(text[None, start : start + len(targets)], state)
            nats = F.cross_entropy(logits[0].float(), targets, reduction="none")
            bits += float(nats[max(len(lead) - 1 - start, 0) :].double().sum()) / math.log(2)
    return bits / len(held_out)


@dataclass(frozen=True)
class Agreement:
    """The largest difference of log-probabilities between reading at once and token by token, and the two speeds."""

    difference: float
    tokens: int
    prefill_per_second: float
    decode_per_second: float


@torch.no_grad()
def agreement(model: LanguageModel, ids: Tensor) -> Agreement:
    """Reads ids, int64 [T], both ways."""
    tokens = ids.to(model.embedding.weight.device)[None]
    with evaluating(model):
        # once before the clock runs: buffers are allocated, kernels chosen
        model(tokens)
        start = time.perf_counter()
        at_once, _ = model(tokens)
        prefill = time.perf_counter() - start
        rows, state = [], None
        start = time.perf_counter()
        for n in range(tokens.shape[1]):
            row, state = model(tokens[:, n : n + 1], state)
            rows.append(row)
        decode = time.perf_counter() - start
    one_by_one = torch.cat(rows, 1)
    difference = (at_once.float().log_softmax(-1) - one_by_one.float().log_softmax(-1)).abs().max()
    count = tokens.shape[1]
    return Agreement(float(difference), count, count / prefill, count / decode)


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Without dropout inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
