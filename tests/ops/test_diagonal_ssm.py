"""The diagonal state space model as a convolution against its recurrence: outputs, final state, every gradient."""

import pytest
import torch
from closeness import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.diagonal_ssm import diagonal_ssm, diagonal_ssm_recurrent


def problem(B, T, H, N, *, slowest=1e-3, initial_state=True, seed=0):
    """Inputs in fp64, complex ones as pairs of reals; moduli of the decays from exp(-slowest) down to 0.05."""
    generator = torch.Generator().manual_seed(seed)
    modulus = (-torch.logspace(torch.tensor(slowest).log10().item(), 0.48, N)).exp().expand(H, N)
    decay = torch.polar(modulus, 6.3 * torch.rand(H, N, generator=generator))
    write, read = torch.randn(2, H, N, 2, generator=generator)
    u, skip = torch.randn(B, T, H, generator=generator), torch.randn(H, generator=generator)
    inputs = [u, torch.view_as_real(decay), write, read, skip]
    if initial_state:
        inputs.append(torch.randn(B, H, N, 2, generator=generator))
    return [x.double() for x in inputs]


def in_reals(form):
    """The op with pairs of reals for complex arguments, decays in complex128 as the mixer gives them."""

    def run(u, decay, write, read, skip, state=None):
        decay, write, read = (torch.view_as_complex(x.double()) for x in (decay, write, read))
        state = None if state is None else torch.view_as_complex(state)
        y, state = form(u, decay, write, read, skip, initial_state=state)
        return y, torch.view_as_real(state)

    return run


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 2), T=st.integers(1, 70), N=st.integers(1, 5), initial_state=st.booleans(), seed=st.integers(0, 99)
)
def test_the_convolution_is_the_recurrence(B, T, N, initial_state, seed):
    inputs = problem(B, T, 3, N, initial_state=initial_state, seed=seed)
    assert_same(in_reals(diagonal_ssm), in_reals(diagonal_ssm_recurrent), inputs, 1e-11)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 300])
def test_fp32_against_the_recurrence_in_fp64(T):
    inputs = problem(2, T, 3, 4)
    expected, expected_state = in_reals(diagonal_ssm_recurrent)(*inputs)
    y, state = in_reals(diagonal_ssm)(*(x.float() if i != 1 else x for i, x in enumerate(inputs)))
    assert y.dtype == state.dtype == torch.float32
    assert_close(y, expected)
    assert_close(state, expected_state)


def test_slow_decays_keep_their_phase_over_thousands_of_tokens():
    """With powers in fp32 the error would be 1e-5."""
    inputs = problem(1, 8192, 2, 3, slowest=1e-5, initial_state=False)
    expected, expected_state = in_reals(diagonal_ssm_recurrent)(*inputs)
    y, state = in_reals(diagonal_ssm)(*(x.float() if i != 1 else x for i, x in enumerate(inputs)))
    assert_close(y, expected, 1e-6)
    assert_close(state, expected_state, 1e-6)


@pytest.mark.parametrize("T", [1, 20])
def test_bfloat16(T):
    inputs = problem(2, T, 3, 4)
    expected, _ = in_reals(diagonal_ssm_recurrent)(*inputs)
    inputs[0] = inputs[0].bfloat16()
    inputs[-1] = inputs[-1].float()
    y, state = in_reals(diagonal_ssm)(*inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(y.double(), expected, 0.02)


def test_no_final_state_unless_asked_for():
    u, decay, write, read, skip, state = problem(1, 1, 2, 2)
    decay, write, read, state = (torch.view_as_complex(x) for x in (decay, write, read, state))
    for initial_state in (None, state):
        _, last = diagonal_ssm(
            u, decay, write, read, skip, initial_state=initial_state, output_final_state=False
        )
        assert last is None
