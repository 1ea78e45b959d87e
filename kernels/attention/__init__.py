"""Softmax attention: self-attention, packed sequences, and queries that continue a cache of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import naive
from kernels.matrix_state import scale_of
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, state_dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads.

        y[t, h] = sum_s p[t, s] v[s, g],   p[t, :] = softmax of scale q[t, h] · k[s, g] over the visible s

    where head h belongs to group g = h // (H / G). With log_decay (forgetting attention) the scores fall with all that
    was forgotten since: log_decay[s + 1, h] + ... + log_decay[p, h] is added to the score of key s for a query that
    stands at row p.
    The queries of a sequence stand at the last of its keys: with T queries and n keys, query t has position
    p = n - T + t. It sees the keys s <= p (all of them if not `causal`), with a window w only those with |p - s| < w.
    A query that sees no key yields zeros. So T = n is self-attention, and T = 1 is one step of decoding.

    Args:
        q: queries [B, T, H, K] in float64, float32, float16 or bfloat16.
        k, v: keys [B, S, G, K] and values [B, S, G, V] in the dtype of q; H is a multiple of G.
        starts, ends: int64 [N]; the keys of sequence n are the rows starts[n] to ends[n] of k and v, by default 0 to S.
            Rows outside are ignored, but must be finite. N is B, or the number of packed sequences.
        log_decay: logarithms of forget gates, <= 0, at the rows of the keys: [B, S, H] in float32 (float64 for float64
            q), with the batch of k; needs `causal`. -inf hides all keys before its row.
        scale: 1 / sqrt(K) by default.
        causal: no query sees a key after its own position.
        window: how many keys up to its own a query sees at most (not `causal`: also as many after it); None for all.
        cu_seqlens: [N + 1] int32 or int64, needs q with B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] of q are the
            queries of sequence n, which may be none. Its keys are the same rows of k [1, T, G, K]; with starts and ends
            rows of k [1, S, G, K], which then may belong to several sequences; or k[n] where k is [N, S, G, K].
        backend: "auto" (the tuned choice, else "sdpa" where it can run), "naive", "flex" or "sdpa"; a named backend
            never falls back.

    Returns:
        y [B, T, H, V] in q's dtype; softmax and sums are accumulated in float32 (float64 for float64).

    q, k, v and log_decay have gradients and second ones; the latter are computed by the naive formula. With log_decay,
    "sdpa" computes in float32 whatever is narrower, except for a few queries on CPU; "flex" does for the gradient of
    log_decay only. "flex" is torch's FlexAttention: on a GPU with Triton, for a window, log_decay, packed sequences or
    starts and ends, it compiles one kernel where "sdpa" launches one for every sequence or block of queries, and reads
    nothing back to the host. It runs where it was measured to be faster, or is named.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, device, index, option or backend name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762); grouped heads: Ainslie et al. 2023,
    "GQA" (arXiv 2305.13245); window: Beltagy et al. 2020, "Longformer" (arXiv 2004.05150); log_decay: Lin et al. 2025,
    "Forgetting transformer" (arXiv 2503.02130).
    """
    if type(q) is not Tensor or type(k) is not Tensor:
        OP.check_types((q, k, v, starts, ends, log_decay, cu_seqlens))
    if q.ndim == 4 and k.ndim == 4 and k.shape[2] and q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: axis H is {q.shape[2]} in q, no multiple of the {k.shape[2]} heads (axis G) of k")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, expected at least 1, or None for no window")
    if log_decay is not None and not causal:
        raise ValueError("attention: log_decay needs causal=True; nothing is forgotten between a query and a later key")
    scale = scale_of("attention", scale, q)
    if cu_seqlens is not None and k.ndim == 4:
        if k.shape[0] > 1 and log_decay is not None:
            if log_decay.shape[:2] != k.shape[:2]:
                raise ValueError(
                    f"attention: axes B, S are {list(k.shape[:2])} in k but {list(log_decay.shape[:2])} in log_decay"
                )
            log_decay = log_decay.flatten(0, 1)[None]
        k, v, starts, ends = _one_row(q, k, v, starts, ends, cu_seqlens.shape[0] - 1)
    elif starts is not None or ends is not None:
        starts, ends = _both(starts, ends, k, q.shape[0])
    return OP(q, k, v, starts, ends, log_decay, cu_seqlens, causal, window or 0, scale, backend)[0]


def _both(starts: Tensor | None, ends: Tensor | None, k: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """starts and ends [N]; where they are None, all rows."""
    full = k.new_full((sequences,), k.shape[1], dtype=torch.int64)
    return torch.zeros_like(full) if starts is None else starts, full if ends is None else ends


def _one_row(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values of packed queries as [1, S, G, K]; starts and ends count from the first of all rows."""
    batch, rows = k.shape[:2]
    if batch == 1 and starts is None and ends is None:
        if rows == q.shape[1]:
            return k, v, None, None
        if sequences > 1:
            raise ValueError(
                f"attention: axis S is {rows} in k but axis T is {q.shape[1]} in q; "
                f"give starts and ends of each of the {sequences} packed sequences"
            )
    if batch not in (1, sequences):
        raise ValueError(f"attention: axis B is {batch} in k, expected 1 or the number of packed sequences {sequences}")
    starts, ends = _both(starts, ends, k, sequences)
    if batch > 1:
        if v.shape[:2] != k.shape[:2]:
            raise ValueError(f"attention: axes B, S are {list(k.shape[:2])} in k but {list(v.shape[:2])} in v")
        first = rows * torch.arange(sequences, device=k.device)
        k, v, starts, ends = k.flatten(0, 1)[None], v.flatten(0, 1)[None], starts + first, ends + first
    return k, v, starts, ends


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    starts: bool = False,
    ends: bool = False,
    log_decay: bool = False,
) -> dict[str, Tensor | None]:
    """Unit-variance queries, keys and values, forget gates as of a new layer.

    Sizes that are not given: S = T, four heads in two groups, K 16, V 24.
    """
    B, T, N = sizes["B"], sizes["T"], sizes.get("N", sizes["B"])
    S, H, K, V = sizes.get("S", T), sizes.get("H", 4), sizes.get("K", 16), sizes.get("V", 24)
    G = sizes.get("G", max(1, H // 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    # a batch: as many keys as there are queries, or more, the last ones; packed: S in N equal parts, if these suffice
    part = S // N if N != B and S // N >= T else S
    last = torch.arange(1, N + 1) * part if part < S else torch.full((N,), S)
    first = last - part if N != B else torch.randint(0, max(S - T, 0) + 1, (N,), generator=generator)
    return {
        "q": normal(B, T, H, K),
        "k": normal(B, S, G, K),
        "v": normal(B, S, G, V),
        "starts": first.to(device) if starts else None,
        "ends": last.to(device) if ends else None,
        "log_decay": F.logsigmoid(normal(B, S, H).to(state_dtype(dtype))) if log_decay else None,
    }


def _cost(problem: Problem) -> Cost:
    """Forward reads q, k, v and writes y; backward reads them and dy, and writes dq, dk, dv, with 5 products for 2."""
    B, T, S, H, G, K, V = (problem.sizes[letter] for letter in "BTSHGKV")
    window = problem.options["window"] or S
    # packed sequences are taken to be equally long
    queries, keys = T, S
    if problem.options["packed"]:
        queries, keys = max(1, T // problem.sizes["N"]), max(1, S // problem.sizes["N"])
    if problem.options["causal"]:
        pairs = sum(max(0, min(keys - queries + 1 + t, window)) for t in range(queries))
    else:
        pairs = queries * min(keys, 2 * window - 1)
    flops = 2 * B * H * pairs * (T // queries) * (K + V)
    numbers = B * T * H * (K + V) + B * S * G * (K + V)
    backward = problem.direction == "backward"
    return Cost(numbers * problem.dtypes["q"].itemsize * (2 if backward else 1), flops * 5 // 2 if backward else flops)


def _differentiable_backward(*args: Tensor | None, backend: str, **options: float) -> tuple[Tensor | None, ...]:
    return naive.backward(*args, **options)  # type: ignore[arg-type]


OP = Op(
    name="attention",
    inputs=(
        Arg("q", "B T H K"),
        Arg("k", "B S G K"),
        Arg("v", "B S G V"),
        Arg("starts", "N", "index", optional=True),
        Arg("ends", "N", "index", optional=True),
        Arg("log_decay", "B S H", "state", optional=True),
    ),
    # lse: the logarithm of the sum of exp(scores) over the visible keys; -inf where there are none
    outputs=(Arg("y", "B T H V"), Arg("lse", "B T H", "state", differentiable=False)),
    options={"causal": True, "window": 0, "scale": 1.0},
    residuals=("q", "k", "v", "starts", "ends", "log_decay", "y", "lse"),
    gradients={"q": "q", "k": "k", "v": "v", "log_decay": "log_decay"},
    backends=(
        Backend("naive", "kernels.attention.naive"),
        Backend("flex", "kernels.attention.flex", devices=("cuda",), foreign=True),
        Backend("sdpa", "kernels.attention.sdpa", devices=("cpu", "cuda")),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
