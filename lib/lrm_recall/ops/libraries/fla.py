"""Adapters to flash-linear-attention (Triton kernels)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from fla.modules.activations import swiglu_linear
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.norm.layernorm import layer_norm as fla_layer_norm
from fla.modules.rotary import rotary_embedding
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
from torch import Tensor

from lrm_kernels import rms_norm as norms
from lrm_kernels import step
from lrm_kernels.matvec import MOST_ROWS, matvec, matvec_swiglu
from lrm_kernels.row_norm import row_norm
from lrm_recall.ops.dispatch import Unsupported

_TRITON = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
_DELTA_RULE_KEYS = 256  # widest head of chunk_delta_rule
# flash-linear-attention's issue 640: there the library refuses to run, and our torch form takes over
_WRONG_GRADIENTS = (3, 4) <= _TRITON < (3, 7, 1) and torch.cuda.get_device_capability()[0] == 9
_SHORT = 64  # up to here, and without gradients, the recurrent kernel is quicker than the chunked one


def _recurrent(x: Tensor) -> bool:
    """Whether the recurrent kernel should run for x [B, T, ...]."""
    return x.shape[1] == 1 or (x.shape[1] <= _SHORT and not torch.is_grad_enabled())


def _decoding(x: Tensor, state: Tensor | None) -> bool:
    """Whether x [B, T, H, K] is a token to be decoded, and our own kernel can take it."""
    return x.shape[1] == 1 and state is not None and not torch.is_grad_enabled() and step.fits(x.shape[-1])


def _step(q, k, v, state, scale, l2_norm=False, **terms):
    """One token through our own kernel, the state changed in place: o [B, 1, H, V] and the state."""
    terms = {name: term[:, 0] for name, term in terms.items()}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = step.step(q[:, 0], k[:, 0], v[:, 0], state, scale=scale, l2_norm=l2_norm, **terms)
    return o.unsqueeze(1), state


def _one_token(x: Tensor) -> bool:
    """Whether x [B, T, ...] is a token of a few sequences to be decoded."""
    return x.dim() > 2 and x.shape[1] == 1 and x.shape[0] <= MOST_ROWS and not torch.is_grad_enabled()


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Unsupported(f"its kernels take float32, float16 and bfloat16, not {x.dtype}")


def _check_rows(x: Tensor) -> None:
    """Of a norm: our own kernels, since the library's are laid out for few channels or few rows."""
    _check_dtype(x)
    if not norms.fits(x):
        raise Unsupported(f"its kernels take rows of 1 to {norms.MOST_CHANNELS} channels, not shape {tuple(x.shape)}")


def gla(q, k, v, log_decay, *, scale=None, initial_state=None, chunk_size=64, output_final_state=True):
    _check_dtype(v)
    if _decoding(q, initial_state):
        return _step(q, k, v, initial_state, scale, log_decay=log_decay)
    options = dict(scale=scale, initial_state=initial_state, output_final_state=output_final_state)
    if _recurrent(q):
        return fused_recurrent_gla(q, k, v, gk=log_decay, **options)
    return chunk_gla(q, k, v, log_decay, **options)


def delta_rule(
    q, k, v, beta, *, scale=None, initial_state=None, l2_norm=False, chunk_size=64, output_final_state=True
):
    _check_dtype(v)
    if _decoding(q, initial_state):
        return _step(q, k, v, initial_state, scale, l2_norm, beta=beta)
    _check_delta(q, v)
    run = fused_recurrent_delta_rule if _recurrent(q) else chunk_delta_rule
    return run(q, k, v, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
               use_qk_l2norm_in_kernel=l2_norm)


def gated_delta_rule(
    q, k, v, log_decay, beta, *, scale=None, initial_state=None, l2_norm=False, chunk_size=64, output_final_state=True
):
    _check_dtype(v)
    if _decoding(q, initial_state):
        return _step(q, k, v, initial_state, scale, l2_norm, log_decay=log_decay, beta=beta)
    _check_delta(q, v)
    if torch.is_grad_enabled() and _WRONG_GRADIENTS:
        raise Unsupported(f"its gradients are wrong on a Hopper GPU with Triton {triton.__version__} (below 3.7.1)")
    run = fused_recurrent_gated_delta_rule if _recurrent(q) else chunk_gated_delta_rule
    return run(q, k, v, g=log_decay, beta=beta, scale=scale, initial_state=initial_state,
               output_final_state=output_final_state, use_qk_l2norm_in_kernel=l2_norm)


def _check_delta(q: Tensor, v: Tensor) -> None:
    if q.shape[-1] > _DELTA_RULE_KEYS:
        raise Unsupported(f"its delta rule takes at most {_DELTA_RULE_KEYS} key channels per head, got {q.shape[-1]}")
    if v.dtype == torch.float32 and not _recurrent(q):
        raise Unsupported("its chunked delta rule takes float16 and bfloat16, not float32")


def retention(q, k, v, log_decay, *, scale=None, initial_state=None, chunk_size=64, output_final_state=True):
    _check_dtype(v)
    if _decoding(q, initial_state):
        return _step(q, k, v, initial_state, scale, log_decay=log_decay.expand(*q.shape[:3]))
    run = fused_recurrent_simple_gla if _recurrent(q) else chunk_simple_gla
    return run(q, k, v, g_gamma=log_decay, scale=scale, initial_state=initial_state,
               output_final_state=output_final_state)


def rwkv5(r, k, v, log_decay, bonus, *, initial_state=None, chunk_size=64, output_final_state=True):
    _check_dtype(v)
    run = fused_recurrent_rwkv6 if _recurrent(r) else chunk_rwkv6
    decay = log_decay.expand_as(k).contiguous()  # [B, T, H, K]: RWKV6's decay may change with the token
    return run(r, k, v, decay, bonus, scale=1.0, initial_state=initial_state, output_final_state=output_final_state)


def rms_norm(x, weight, eps):
    _check_rows(x)
    with torch.cuda.device(x.device):  # which need not be the current one
        return row_norm(x, weight, eps) if _one_token(x) else norms.rms_norm(x, weight, eps)


def layer_norm(x, weight, bias, eps):
    _check_dtype(x)
    if not torch.is_grad_enabled():
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)  # it is torch's backward pass that takes its time
    return fla_layer_norm(x, weight, bias, eps=eps)


def add_rms_norm(x, stream, weight, eps):
    _check_rows(x)
    with torch.cuda.device(x.device):
        if _one_token(x):
            return row_norm(x, weight, eps, residual=stream)
        return norms.add_rms_norm(x, stream, weight, eps)


def gated_rms_norm(x, gate, weight, eps):
    _check_rows(x)
    with torch.cuda.device(x.device):
        return row_norm(x, weight, eps, gate=gate) if _one_token(x) else norms.rms_norm(x, weight, eps, gate)


def rotate(x, cos, sin):
    _check_dtype(x)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if cos.shape[0] == 1:
        return rotary_embedding(x, cos[0], sin[0])
    turned = rotary_embedding(x.flatten(0, 1).unsqueeze(0), cos.flatten(0, 1), sin.flatten(0, 1))  # [1, B * T, H, K]
    return turned.view_as(x)


def swiglu(x, gate, up, down):
    _check_dtype(x)
    if _one_token(x):
        return matvec(matvec_swiglu(x, gate, up), [down])[0]
    return swiglu_linear(F.linear(x, gate), F.linear(x, up), down, None)


def cross_entropy(logits, labels):
    return cross_entropy_loss(logits, labels, inplace_backward=True)[0]
