"""Adapters to mamba-ssm (CUDA and Triton kernels)."""

from __future__ import annotations

import torch
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

from lrm_kernels.matvec import MOST_ROWS
from lrm_kernels.row_norm import row_norm
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.linear import plain

_CHUNK = 256  # tokens in a chunk of the SSD kernels: the size that they were tuned for
_SCAN_STATES = 256  # most state channels of the selective scan
_GROUP = 512  # of its channels, without gradients: beside its result it holds three tensors as large as its input
_LARGE = 2**28  # elements of an input that is read in such groups: 2.5 GiB less at 2^29, and 1% slower


def ssd(x, dt, A, B, C, D=None, dt_bias=None, *, initial_state=None, chunk_size=64, output_final_state=True):
    if x.dtype == torch.float64:
        raise Unsupported("its kernels do not take float64")
    if x.shape[1] == 1 and initial_state is not None and not torch.is_grad_enabled():
        return _ssd_step(x, dt, A, B, C, D, dt_bias, initial_state)
    out = mamba_chunk_scan_combined(x, dt, A, B, C, _CHUNK, D=D, dt_bias=dt_bias, dt_softplus=dt_bias is not None,
                                    initial_states=initial_state, return_final_states=output_final_state)
    return out if output_final_state else (out, None)


def _ssd_step(x, dt, A, B, C, D, dt_bias, state):
    """One token, the state changed in place."""
    heads = state.shape[:3]  # B, H, P
    softplus = dt_bias is not None
    dt_bias = A.new_zeros(1).expand(heads[1:]) if dt_bias is None else dt_bias.unsqueeze(-1).expand(heads[1:])
    D = None if D is None else D.unsqueeze(-1).expand(heads[1:])
    y = selective_state_update(
        state, x[:, 0], dt[:, 0].unsqueeze(-1).expand(heads), A.view(-1, 1, 1).expand(state.shape[1:]),
        B[:, 0], C[:, 0], D, dt_bias=dt_bias, dt_softplus=softplus,
    )  # [B, H, P]
    return y.unsqueeze(1), state


def mamba2_inner(projected, conv, dt_bias, A, D, norm, out_proj, *, head_dim, n_groups):
    """Everything behind Mamba2's in_proj in one call that saves little for the backward pass: [B, T, D]."""
    return mamba_split_conv1d_scan_combined(
        projected, conv.weight.squeeze(1), conv.bias, dt_bias, A, D=D, chunk_size=_CHUNK, activation="silu",
        rmsnorm_weight=norm.weight, rmsnorm_eps=norm.eps, outproj_weight=out_proj.weight, outproj_bias=out_proj.bias,
        headdim=head_dim, ngroups=n_groups, norm_before_gate=False,
    )


def selective_scan(
    x, dt, A, B, C, D=None, gate=None, dt_bias=None, *, initial_state=None, chunk_size=64, output_final_state=True
):
    if x.dtype == torch.float64:
        raise Unsupported("its kernels do not take float64")
    if A.shape[-1] > _SCAN_STATES:
        raise Unsupported(f"it takes at most {_SCAN_STATES} state channels, got {A.shape[-1]}")
    if x.shape[1] == 1 and initial_state is not None and not torch.is_grad_enabled():
        y = selective_state_update(initial_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D,
                                   None if gate is None else gate[:, 0], dt_bias, dt_softplus=dt_bias is not None)
        return y.unsqueeze(1), initial_state  # [B, 1, E]; the state is changed in place
    if initial_state is not None:
        raise Unsupported("its scan cannot begin from a state")
    x, dt, gate = (y if y is None else y.mT for y in (x, dt, gate))  # [B, E, T]
    B, C = B.mT.contiguous(), C.mT.contiguous()  # [B, N, T]
    D, dt_bias = (y if y is None else y.float() for y in (D, dt_bias))  # [E]

    def scan(some):
        """What some of the channels give, [B, E', T], and their state, [B, E', N]."""
        u, delta, z = (y if y is None else y[:, some] for y in (x, dt, gate))
        skip, bias = (y if y is None else y[some] for y in (D, dt_bias))
        return selective_scan_fn(u, delta, A[some], B, C, skip, z, bias, delta_softplus=bias is not None,
                                 return_last_state=True)

    if torch.is_grad_enabled() or x.numel() < _LARGE:
        y, state = scan(slice(None))
    else:
        y, state = x.new_empty(x.shape), A.new_empty(x.shape[0], *A.shape)  # [B, E, T], [B, E, N]
        for start in range(0, x.shape[1], _GROUP):
            some = slice(start, start + _GROUP)
            y[:, some], state[:, some] = scan(some)
    # The library's state is a view of those after every 2,048 tokens, all of which a cache would keep
    return y.mT, state.contiguous() if output_final_state else None


def mamba_inner(x, in_proj, conv, x_proj, dt_proj, out_proj, A, D):
    """A whole Mamba layer in one call that saves little for the backward pass: [B, T, D] to the same."""
    if plain(in_proj):
        projected = in_proj.weight @ x.flatten(0, 1).mT  # [2E, B * T], as the scan reads it
        projected = projected.unflatten(1, x.shape[:2]).transpose(0, 1)  # [B, 2E, T]
    else:
        projected = in_proj(x).mT  # [B, 2E, T], which the scan copies
    return mamba_inner_fn(
        projected, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, out_proj.weight, out_proj.bias,
        A, None, None, D.float(), delta_bias=dt_proj.bias.float(), delta_softplus=True,
    )


def rms_norm_of_gated(x, gate, weight, eps, group_size):
    if x.dtype == torch.float64:
        raise Unsupported("its kernels do not take float64")
    if x.shape[1] == 1 and x.shape[0] <= MOST_ROWS and not torch.is_grad_enabled():
        groups = (x.shape[-1] // group_size, group_size)
        y = row_norm(x.unflatten(-1, groups), weight, eps, gate=gate.unflatten(-1, groups), gate_first=True)
        return y.view_as(x)
    return rmsnorm_fn(x, weight, None, z=gate, eps=eps, group_size=group_size, norm_before_gate=False)
