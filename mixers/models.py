"""Whole networks around a Stack, as in HGRN's paper: a language model with generation, and an image classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixers import registry
from mixers.checkpoint import Network
from mixers.sampling import Sampling
from mixers.stack import Stack


class LanguageModel(Network):
    """Embedding, `Stack`, head: `logits, state = model(tokens, state=None, *, cu_seqlens=None)`.

        x = E[tokens] · √dim;   logits = W Stack(x),   W = E where tied

    tokens int64 [B, T], logits [B, T, vocabulary]; state and cu_seqlens as for every mixer, see `SequenceMixer`.

    Args:
        vocabulary: how many tokens there are.
        dim: width of the Stack.
        layers: the mixers' names, one a layer.
        options: options of each mixer by name: {"hgrn": {"complex": False}}.
        glu_width, glu_activation, norm, bias, dropout, bounds: see `Stack`; dropout also acts on the embedding.
        tied: the head is the embedding's matrix and has no bias; else a linear layer of its own, with `bias`.
        scale_embedding: multiply the embedding by √dim, so that tied rows of norm 1 give inputs of variance 1.

    Source: the WikiText-103 model of arXiv 2311.04823 is dim 512, six layers of "hgrn", glu_activation "identity",
    dropout 0.1 and the defaults for the rest.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        layers: Sequence[str],
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        glu_width: int | None = None,
        glu_activation: str = "silu",
        norm: str = "layer",
        bias: bool = True,
        dropout: float = 0.0,
        bounds: str | None = "inclusive",
        tied: bool = True,
        scale_embedding: bool = True,
    ) -> None:
        super().__init__()
        if vocabulary < 1:
            raise ValueError(f"LanguageModel: vocabulary is {vocabulary}, expected at least 1")
        self.vocabulary, self.dim = vocabulary, dim
        self.scale = dim**0.5 if scale_embedding else 1.0
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.stack = Stack(
            dim,
            layers,
            options=options,
            glu_width=glu_width,
            glu_activation=glu_activation,
            norm=norm,
            bias=bias,
            dropout=dropout,
            bounds=bounds,
        )
        if not self.stack.causal:
            raise ValueError(f"LanguageModel: some of the layers {list(layers)} see the future (bidirectional)")
        self.head = None if tied else nn.Linear(dim, vocabulary, bias=bias)

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first token, of `batch` sequences."""
        weight = self.embedding.weight
        return self.stack.init_state(batch, device=weight.device, dtype=weight.dtype)

    def forward(self, tokens: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits of the token after each of `tokens` [B, T], and the state after the last.

        Raises:
            TypeError: tokens are no integers. ValueError: tokens, state or cu_seqlens have the wrong shape.
        """
        x, state = self.features(tokens, state, cu_seqlens=cu_seqlens)
        return self.logits(x), state

    def features(self, tokens: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """What the head sees, [B, T, dim], and the state: for whoever needs the logits of few of many positions."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"LanguageModel: tokens are {tokens.dtype}, expected int64 or int32")
        if tokens.ndim != 2:
            raise ValueError(f"LanguageModel: tokens have {tokens.ndim} axes {list(tokens.shape)}, expected [B, T]")
        x = self.dropout(self.embedding(tokens) * self.scale)
        return self.stack(x, state, cu_seqlens=cu_seqlens)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of features [..., dim]."""
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def generate(
        self,
        prompts: Sequence[Tensor],
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continues each prompt by `steps` tokens: int64 [prompts, steps], on the model's device.

        The prompts run packed through the model once; from then on each token costs one step from the state, however
        long the text has become. Dropout is off. One seed, one result: the draws come from a generator of their own.

        Args:
            prompts: int64 [length], lengths may differ, at least 1 each.
            steps: how many tokens to add.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: draw among the k likeliest tokens only.
            top_p: draw among the fewest likeliest tokens whose probabilities sum to at least top_p.
            seed: of the draws.

        Raises:
            TypeError: a prompt is no tensor of integers.
            ValueError: there is no prompt, one is empty or has axes, or an option is out of its range.
        """
        if steps < 0:
            raise ValueError(f"generate: steps is {steps}, expected at least 0")
        tokens = self.stream(prompts, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        columns = list(islice(tokens, steps))
        if not columns:
            return torch.empty(len(prompts), 0, dtype=torch.int64, device=self.embedding.weight.device)
        return torch.stack(columns, 1)

    def stream(
        self,
        prompts: Sequence[Tensor],
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[Tensor]:
        """Like `generate`, but yields the next token of every prompt, int64 [prompts], as they come and without end."""
        device = self.embedding.weight.device
        return self._stream(*_pack(prompts, device), Sampling(temperature, top_k, top_p, device, seed))

    # as a decorator it turns gradients off for each step and not for whoever consumes the tokens in between
    @torch.no_grad()
    def _stream(self, packed: Tensor, cu_seqlens: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            x, state = self.features(packed, cu_seqlens=cu_seqlens)
            x = x[:, cu_seqlens[1:] - 1].transpose(0, 1)
            while True:
                tokens = sampling.draw(self.logits(x)[:, 0])
                yield tokens
                x, state = self.features(tokens[:, None], state)
        finally:
            self.train(was_training)


class ImageClassifier(Network):
    """Patches in raster order, a `Stack` that sees them from both sides, mean over patches, linear head.

    images [B, channels, size, size] -> logits [B, classes]. No position embedding, no class token.

    Args:
        size: height and width of an image, a multiple of `patch`.
        patch: height and width of a patch.
        dim: width of the Stack.
        layers: the mixers' names, one a layer; those that can are built with bidirectional=True.
        classes: how many classes there are.
        channels: of an image.
        options: options of each mixer by name.
        glu_width, glu_activation, norm, bias, dropout, bounds: see `Stack`.

    Source: the ImageNet models of arXiv 2311.04823 are size 224, patch 14, 12 layers of "hgrn", dim 192 or 384, and
    the defaults for the rest.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        dim: int,
        layers: Sequence[str],
        classes: int,
        *,
        channels: int = 3,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        glu_width: int | None = None,
        glu_activation: str = "silu",
        norm: str = "layer",
        bias: bool = True,
        dropout: float = 0.0,
        bounds: str | None = "exclusive",
    ) -> None:
        super().__init__()
        if patch < 1 or size < patch or size % patch:
            raise ValueError(f"ImageClassifier: size {size} is no multiple of patch {patch}")
        self.size, self.patch, self.channels = size, patch, channels
        both = {name: dict((options or {}).get(name, {})) for name in [*layers, *(options or {})]}
        for name in set(layers):
            if "bidirectional" in registry.options(name):
                both[name].setdefault("bidirectional", True)
        self.embedding = nn.Linear(channels * patch * patch, dim)
        self.stack = Stack(
            dim,
            layers,
            options=both,
            glu_width=glu_width,
            glu_activation=glu_activation,
            norm=norm,
            bias=bias,
            dropout=dropout,
            bounds=bounds,
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, size, size]; raises ValueError for any other shape."""
        expected = (self.channels, self.size, self.size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"ImageClassifier: images are {list(images.shape)}, expected B and then {list(expected)}")
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        x, _ = self.stack(self.embedding(patches))
        return self.head(x.mean(1))


def _pack(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """All prompts behind one another [1, total], and their borders [N + 1]."""
    if isinstance(prompts, Tensor) or not len(prompts):
        raise ValueError("generate: prompts must be a list of at least one tensor [length]")
    for n, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor):
            raise TypeError(f"generate: prompt {n} is a {type(prompt).__name__}, expected a tensor [length]")
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"generate: prompt {n} has shape {list(prompt.shape)}, expected [length] with length >= 1")
    lengths = torch.tensor([0, *map(len, prompts)])
    return torch.cat([prompt.to(device) for prompt in prompts])[None], lengths.cumsum(0).to(device)
