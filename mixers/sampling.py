"""Drawing tokens from logits: temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampling:
    """How tokens are drawn, with a random generator of its own; the options are those of `LanguageModel.generate`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, device: torch.device, seed: int
    ) -> None:
        if not temperature >= 0:
            raise ValueError(f"generate: temperature is {temperature}, expected at least 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p is {top_p}, expected 0 < top_p <= 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, logits: Tensor) -> Tensor:
        """One token for each row of logits [N, V]: int64 [N]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.allowed(logits.float() / self.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits [N, V] with -inf for every token that top_k or top_p rules out; the likeliest always stays."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # exactly k, also among equals
            values, places = logits.topk(self.top_k, -1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, places, values)
        if self.top_p is not None and self.top_p < 1:
            values, places = logits.sort(dim=-1, descending=True, stable=True)
            shares = values.softmax(-1)
            # a token goes if those before it suffice already; nothing comes before the first
            before = shares.cumsum(-1) - shares
            before[..., 0] = 0
            values = values.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter(-1, places, values)
        return logits
