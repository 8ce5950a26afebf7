"""RWKV4's recurrence, one program for a few channels of a row: a walk over the tokens with the state in registers.

    wkv[t] = (A[t-1] + exp(u + k[t]) v[t]) / total[t]      total[t] = B[t-1] + exp(u + k[t])
    A[t] = exp(d) A[t-1] + exp(k[t]) v[t]                  B[t] = exp(d) B[t-1] + exp(k[t])          d = -exp(w)

(RWKV, arXiv 2305.13048, the WKV operator.) Weights have no bounds, so A = exp(p) a and B = exp(p) b, with p the largest
log weight among them.

Nothing but the inputs is kept for the backward pass. Its first walk runs the recurrence again, with dA and dB, the
derivatives of A and B by d, beside A and B, and leaves wkv and log total for the second walk, which goes from the last
token to the first with the gradients of A and B:

    grad A[t-1] = exp(d) grad A[t] + grad[t] / total[t]    grad B[t-1] = exp(d) grad B[t] - grad[t] wkv[t] / total[t]

These are sums of the same kind, kept as exp(s) times two numbers. No atomics: results are the same in every run.

B batch (where it is a size), T tokens, D channels, all apart from each other
state [3, D]: a, b and p
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_BLOCK = 32  # channels in one program, one a thread: the walk is long, so many short programs
_TOKENS = 8  # in one round, while the inputs of the next are on their way

_NOTHING = tl.constexpr(-1e38)  # log weight of what does not count, as in the state that callers keep


@triton.jit
def _read(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _read_tokens(xs, place, step, start, end, TOKENS: tl.constexpr):
    """Of TOKENS tokens in the order of the walk, from its token `start` on: a block [BLOCK] of each of `xs`.

    The first stands at `place`, the next `step` elements on; zeros from the walk's token `end` on.
    """
    tokens = ()
    for i in tl.static_range(TOKENS):
        blocks = ()
        for n in tl.static_range(len(xs)):
            blocks += (_read(xs[n] + place + i * step, start + i < end),)
        tokens += (blocks,)
    return tokens


@triton.jit
def _parameters(w, u, channels, inside):
    """d and u of the channels, both [BLOCK]."""
    return -tl.exp(_read(w + channels, inside)), _read(u + channels, inside)


@triton.jit
def _first_state(initial, row, channels, D, inside, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """a, b and p before the first token, [BLOCK] each."""
    if GIVEN:
        place = initial + row * 3 * D + channels
        a, b, p = _read(place, inside), _read(place + D, inside), _read(place + 2 * D, inside)
    else:
        a = tl.zeros([BLOCK], dtype=tl.float32)
        b = tl.zeros([BLOCK], dtype=tl.float32)
        p = tl.full([BLOCK], _NOTHING, dtype=tl.float32)
    return a, b, p


@triton.jit
def _share(b, p, log_weight):
    """Of exp(p) b and exp(log_weight), over their sum exp(log_total): exp(p) and exp(log_weight); and log_total."""
    top = tl.maximum(p, log_weight)
    past = tl.exp(p - top)
    now = tl.exp(log_weight - top)
    weight = past * b + now
    return past / weight, now / weight, tl.log(weight) + top


@triton.jit
def _fade(p, d, log_weight):
    """The larger of p + d and log_weight, and both over it: the old sums' factor and the new token's."""
    top = tl.maximum(p + d, log_weight)
    return tl.exp(p + d - top), tl.exp(log_weight - top), top


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    w, u, k, v, initial, wkv, final, T, D,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < D
    end = tl.where(inside, T, 0)  # a channel that is not there has no tokens
    d, bonus = _parameters(w, u, channels, inside)
    a, b, p = _first_state(initial, row, channels, D, inside, GIVEN, BLOCK)
    place = row * T * D + channels
    tokens = _read_tokens((k, v), place, D, 0, end, TOKENS)
    for start in range(0, T, TOKENS):
        place_ahead = place + TOKENS * D  # read before the stores of this round, which no load is moved across
        ahead = _read_tokens((k, v), place_ahead, D, start + TOKENS, end, TOKENS)
        for i in tl.static_range(TOKENS):
            here = start + i < end
            key, value = tokens[i]
            past, now, _ = _share(b, p, bonus + key)
            average = past * a + now * value
            tl.store(wkv + place + i * D, average.to(wkv.dtype.element_ty), mask=here)
            left, added, top = _fade(p, d, key)
            a = tl.where(here, left * a + added * value, a)
            b = tl.where(here, left * b + added, b)
            p = tl.where(here, top, p)
        place, tokens = place_ahead, ahead
    if WANTED:
        place = row * 3 * D + channels
        tl.store(final + place, a, mask=inside)
        tl.store(final + place + D, b, mask=inside)
        tl.store(final + place + 2 * D, p, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    w, u, k, v, initial, grads, grad_final, wkv, log_total, grad_w, grad_u, grad_k, grad_v, grad_initial, T, D,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < D
    end = tl.where(inside, T, 0)  # a channel that is not there has no tokens
    d, bonus = _parameters(w, u, channels, inside)
    a0, b0, p0 = _first_state(initial, row, channels, D, inside, GIVEN, BLOCK)

    # From the first token to the last: wkv, the log of its denominator, and the gradient of d.
    a, b, p = a0, b0, p0
    d_a = tl.zeros([BLOCK], dtype=tl.float32)  # derivatives by d, over exp(p) too
    d_b = tl.zeros([BLOCK], dtype=tl.float32)
    grad_d = tl.zeros([BLOCK], dtype=tl.float32)
    place = row * T * D + channels
    tokens = _read_tokens((k, v, grads), place, D, 0, end, TOKENS)
    for start in range(0, T, TOKENS):
        place_ahead = place + TOKENS * D
        ahead = _read_tokens((k, v, grads), place_ahead, D, start + TOKENS, end, TOKENS)
        for i in tl.static_range(TOKENS):
            here = start + i < end
            key, value, grad = tokens[i]
            past, now, log_sum = _share(b, p, bonus + key)
            average = past * a + now * value
            tl.store(wkv + place + i * D, average, mask=here)
            tl.store(log_total + place + i * D, log_sum, mask=here)
            grad_d += grad * past * (d_a - average * d_b)
            left, added, top = _fade(p, d, key)
            d_a = tl.where(here, left * (a + d_a), d_a)
            d_b = tl.where(here, left * (b + d_b), d_b)
            a = tl.where(here, left * a + added * value, a)
            b = tl.where(here, left * b + added, b)
            p = tl.where(here, top, p)
        place, tokens = place_ahead, ahead
    tl.debug_barrier()  # a thread may read below what another one wrote

    # From the last token to the first: the gradients of A and, with its sign turned, of B, over exp(s).
    grad_a = tl.zeros([BLOCK], dtype=tl.float32)
    minus_grad_b = tl.zeros([BLOCK], dtype=tl.float32)
    if WANTED:
        place = grad_final + row * 3 * D + channels
        grad_a = _read(place, inside)
        minus_grad_b = -_read(place + D, inside)
        grad_d += grad_a * d_a - minus_grad_b * d_b
    bonus_sum = tl.zeros([BLOCK], dtype=tl.float32)
    s = tl.where(inside, -p, 0.0)
    place = (row * T + T - 1) * D + channels
    tokens = _read_tokens((k, v, grads, wkv, log_total), place, -D, 0, end, TOKENS)
    for start in range(0, T, TOKENS):
        place_ahead = place - TOKENS * D
        ahead = _read_tokens((k, v, grads, wkv, log_total), place_ahead, -D, start + TOKENS, end, TOKENS)
        for i in tl.static_range(TOKENS):
            here = start + i < end
            key, value, grad, average, log_sum = tokens[i]
            now = tl.where(here, tl.exp(bonus + key - log_sum) * grad, 0.0)
            later = tl.exp(tl.minimum(key + s, 0.0))  # no weight is above a sum that it is in, but by rounding
            of_bonus = now * (value - average)
            bonus_sum += of_bonus
            of_key = of_bonus + later * (grad_a * value - minus_grad_b)
            of_value = now + later * grad_a
            tl.store(grad_k + place - i * D, of_key.to(grad_k.dtype.element_ty), mask=here)
            tl.store(grad_v + place - i * D, of_value.to(grad_v.dtype.element_ty), mask=here)
            left, added, top = _fade(s, d, -log_sum)
            grad_a = tl.where(here, left * grad_a + added * grad, grad_a)
            minus_grad_b = tl.where(here, left * minus_grad_b + added * grad * average, minus_grad_b)
            s = tl.where(here, top, s)
        place, tokens = place_ahead, ahead
    tl.store(grad_w + row * D + channels, grad_d * d, mask=inside)  # d = -exp(w) is its own derivative
    tl.store(grad_u + row * D + channels, bonus_sum, mask=inside)
    if GIVEN:
        scale = tl.exp(p0 + s)
        of_a, of_b = scale * grad_a, -scale * minus_grad_b
        place = row * 3 * D + channels
        tl.store(grad_initial + place, of_a, mask=inside)
        tl.store(grad_initial + place + D, of_b, mask=inside)
        tl.store(grad_initial + place + 2 * D, of_a * a0 + of_b * b0, mask=inside)


class _WKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, u, k, v, initial, output_final_state):
        B, T, D = k.shape
        wkv = torch.empty_like(v)
        final = v.new_empty(B, 3, D, dtype=torch.float32) if output_final_state else None
        given = initial is not None
        _forward_kernel[(B, triton.cdiv(D, _BLOCK))](
            w, u, k, v, initial if given else w, wkv, final if output_final_state else w, T, D,
            GIVEN=given, WANTED=output_final_state, TOKENS=_TOKENS, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(w, u, k, v, initial)
        return wkv, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_final):
        w, u, k, v, initial = ctx.saved_tensors
        B, T, D = k.shape
        wkv, log_total = (k.new_empty(B, T, D, dtype=torch.float32) for _ in range(2))
        grad_w, grad_u = (k.new_empty(B, D, dtype=torch.float32) for _ in range(2))
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        given, wanted = initial is not None, grad_final is not None
        grad_initial = torch.empty_like(initial) if given else None
        _backward_kernel[(B, triton.cdiv(D, _BLOCK))](
            w, u, k, v, initial if given else w, grad.contiguous(), grad_final.contiguous() if wanted else w,
            wkv, log_total, grad_w, grad_u, grad_k, grad_v, grad_initial if given else w, T, D,
            GIVEN=given, WANTED=wanted, TOKENS=_TOKENS, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip
        return grad_w.sum(0).to(w.dtype), grad_u.sum(0).to(u.dtype), grad_k, grad_v, grad_initial, None


def wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, *, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """All tokens of RWKV4's recurrence, computed in fp32.

    Args:
        w: [D], finite; a state decays by exp(-exp(w)).
        u: [D], the bonus of the token itself, in logs.
        k: [B, T, D] log weights, of any finite size; -1e38 for a token that does not count.
        v: [B, T, D]; it may differ from k in dtype.
        initial_state: [B, 3, D], a, b and p; that of no tokens by default, (0, 0, -1e38).
        output_final_state: False for a state that nobody reads.

    Returns:
        wkv [B, T, D] in v's dtype, and the state after the last token, [B, 3, D] fp32, or None if it was not asked for.
        Differentiable once in every tensor argument; the final state's p is a constant.

    Raises:
        ValueError: shapes that do not fit, or a dtype other than float32, float16 and bfloat16.
    """
    _check(w, u, k, v, initial_state)
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    initial = None if initial_state is None else initial_state.float().contiguous()
    return _WKV.apply(w, u, k, v, initial, output_final_state)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    if k.dim() != 3 or v.shape != k.shape:
        raise ValueError(f"k and v must share one shape [B, T, D], got {tuple(k.shape)} and {tuple(v.shape)}")
    B, _, D = k.shape
    expected = {"w": (w, (D,)), "u": (u, (D,))}
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (B, 3, D))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {shape} beside k of {tuple(k.shape)}, got {tuple(x.shape)}")
    for name, x in {"w": w, "u": u, "k": k, "v": v}.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
