"""H3 against its recurrences written out in fp64, its names and start against zoology's, and what it refuses."""

import math

import pytest
import torch
from closeness import assert_close

from lrm_recall.context import Context
from lrm_recall.mixers.h3 import H3


def h3_by_definition(mixer, x):
    """One row [T, D]: both SSMs stepped as full matrices, the diagonal one with both states of each conjugate pair."""
    p = dict(mixer.named_parameters())
    D, N, K = mixer.hidden_size, mixer.d_state, mixer.head_dim
    q, k, v = (x @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"] for name in "qkv")
    up = torch.diag(torch.ones(N - 1), -1).to(x)  # moves every element of a state up by one
    B, C = p["ssm_k_kernel.kernel.B"], p["ssm_k_kernel.kernel.C"][0]
    state, shifted = x.new_zeros(D, N), []
    for t in range(len(x)):
        state = state @ up.T + B * k[t].unsqueeze(-1)
        shifted.append((C * state).sum(-1) + p["ssm_k_D"] * k[t])
    k = torch.stack(shifted)

    A = torch.complex(-p["kernel.kernel.inv_A_real"].exp(), p["kernel.kernel.A_imag"])
    B, C = (torch.view_as_complex(y) for y in (p["kernel.kernel.B"], p["kernel.kernel.C"][0]))
    A, B, C = (torch.cat((y, y.conj()), -1) for y in (A, B, C))  # [H, N]
    dt, eye = p["kernel.kernel.log_dt"].exp(), torch.eye(N).to(A)
    y = x.new_zeros(len(x), D)
    for h in range(D // K):
        inverse = torch.linalg.inv(eye - dt[h] / 2 * torch.diag(A[h]))
        step, write = inverse @ (eye + dt[h] / 2 * torch.diag(A[h])), inverse @ (dt[h] * B[h])
        for i in range(K):  # the key's channel, which the queries sum over
            for j in range(K):  # the value's
                state = torch.zeros_like(write)
                for t in range(len(x)):
                    kv = k[t, h * K + i] * v[t, h * K + j]
                    state = step @ state + write * kv
                    out = (C[h] @ state).real + p["D"][h] * kv
                    y[t, j * (D // K) + h] += q[t, h * K + i] * out
    return y @ p["output_linear.weight"].T + p["output_linear.bias"]


def make(**options):
    torch.manual_seed(0)
    mixer = H3(6, **options).double()
    kernel = mixer.ssm_k_kernel["kernel"]
    torch.nn.init.normal_(kernel.B)  # as after training; it starts as a unit vector
    torch.nn.init.normal_(mixer.kernel["kernel"].B)
    return mixer


@pytest.mark.parametrize("options", [{"d_state": 4}, {"d_state": 6, "head_dim": 2}, {"d_state": 32, "head_dim": 3}])
def test_h3_is_its_formula(options):
    mixer, x = make(**options), torch.randn(1, 11, 6).double()
    with torch.no_grad():
        expected = h3_by_definition(mixer, x[0])
        assert_close(mixer(x)[0], expected, 1e-12)
        cache, steps = {}, []
        for t in range(11):
            steps.append(mixer(x[:, t : t + 1], Context(past_length=t, cache=cache)))
    assert_close(torch.cat(steps, 1)[0], expected, 1e-12)


def test_the_state_has_one_size():
    mixer, cache = H3(6, d_state=8, head_dim=3), {}
    for past, T in ((0, 5), (5, 1), (6, 40), (46, 1)):
        mixer(torch.randn(2, T, 6), Context(past_length=past, cache=cache))
        assert {name: tuple(x.shape) for name, x in cache.items()} == {
            "shift_state": (2, 7, 6), "state": (2, 3, 3, 2, 4, 2)
        }  # fmt: skip
        assert cache["state"].dtype == torch.float32
    assert mixer.state_size() == mixer.state_size(99) == 7 * 6 + 3 * 3 * 2 * 4 * 2


def test_later_inputs_change_no_bit_of_an_output():
    mixer, x = H3(8, d_state=16, head_dim=2), torch.randn(2, 300, 8)
    with torch.no_grad():
        expected = mixer(x)
        x[:, 170:] = 100 * torch.randn(2, 130, 8)
        assert torch.equal(mixer(x)[:, :170], expected[:, :170])


def test_h3_has_zoologys_names():
    mixer = H3(8, d_state=6, head_dim=2)
    projection = {f"{name}.{p}": shape for name in ("q_proj", "k_proj", "v_proj", "output_linear")
                  for p, shape in (("weight", (8, 8)), ("bias", (8,)))}  # fmt: skip
    assert {name: tuple(p.shape) for name, p in mixer.state_dict().items()} == {
        **projection, "ssm_k_D": (8,), "D": (4,),
        "ssm_k_kernel.kernel.B": (8, 6), "ssm_k_kernel.kernel.C": (1, 8, 6),
        "kernel.kernel.C": (1, 4, 3, 2), "kernel.kernel.B": (4, 3, 2), "kernel.kernel.log_dt": (4,),
        "kernel.kernel.inv_A_real": (4, 3), "kernel.kernel.A_imag": (4, 3),
    }  # fmt: skip


def test_h3_starts_as_zoologys():
    """After init_weights on tensors that came without values, as transformers makes them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        mixer = H3(256, d_state=64, head_dim=2)
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    mixer.init_weights(0.02)
    p = {name: x for name, x in mixer.named_parameters() if "proj" not in name and "linear" not in name}
    assert all(x.isfinite().all() for x in p.values())
    assert p["ssm_k_kernel.kernel.B"].sum() == 256 and p["ssm_k_kernel.kernel.B"][:, 0].eq(1).all()
    assert 0.12 < p["ssm_k_kernel.kernel.C"].abs().max() <= 1 / 8
    assert torch.equal(p["kernel.kernel.A_imag"][3], math.pi * torch.arange(32))
    assert torch.allclose(p["kernel.kernel.inv_A_real"].exp(), torch.tensor(0.5))
    assert torch.equal(p["kernel.kernel.B"][5, 7], torch.tensor((1.0, 0.0)))
    assert abs(p["kernel.kernel.C"].square().mean() - 0.5) < 0.05
    dt = p["kernel.kernel.log_dt"].exp()
    assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1
    assert all(abs(p[name].std() - 1) < 0.2 for name in ("D", "ssm_k_D"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 4}, "head_dim must divide hidden_size: got head_dim=4, hidden_size=6"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"d_state": 7}, "d_state must be even and at least 2, .* got 7"),
        ({"d_state": 0}, "d_state must be even .* got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        H3(6, **options)
