"""One token of attention to buffers of keys and values, against every score written out, and through a model."""

import pytest
import torch
from closeness import assert_close
from conftest import make_model
from decoding_checks import assert_steps_agree, plain_loop

from lrm_kernels import attention_step as attention_step_module
from lrm_kernels.attention_step import attention_step, attention_step_reference, fits
from lrm_recall.mixers import attention
from lrm_recall.ops.attention_step import attention_step_torch
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.libraries import own

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
THETA = 10_000.0


def problem(device, dtype=torch.float32, *, B=1, H=2, G=2, K=16, C=80, length=40, offset=(0,), rotary=True, seed=0):
    """Arguments of a step; what no token has filled is NaN, and so is left padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = draw(B, G, C, K), draw(B, G, C, K)
    offset = torch.tensor([offset[b % len(offset)] for b in range(B)], device=device)
    for b in range(B):
        for buffer in (keys, values):
            buffer[b, :, length:] = torch.nan
            buffer[b, :, : offset[b]] = torch.nan
    frequencies = own._frequencies(K, THETA, torch.device(device)) if rotary else None
    return {"q": 2 * draw(B, H, K), "k": draw(B, G, K), "v": draw(B, G, K), "keys": keys, "values": values,
            "length": torch.tensor(length, device=device), "offset": offset, "frequencies": frequencies}  # fmt: skip


def copied(arguments):
    return {**arguments, "keys": arguments["keys"].clone(), "values": arguments["values"].clone()}


def check(arguments):
    dtype, length = arguments["q"].dtype, arguments["length"]
    before, theirs = copied(arguments), copied(arguments)
    theirs["keys"][theirs["keys"].isnan()] = 0  # the reference multiplies scores that it then masks
    expected = attention_step_reference(**theirs)
    actual = attention_step(**arguments)
    assert actual.dtype == dtype and actual.shape == arguments["q"].shape
    assert_close(actual.float(), expected.float(), TOLERANCE[dtype])
    for name in ("keys", "values"):
        now, old = arguments[name], before[name]
        assert_close(now[:, :, length].float(), theirs[name][:, :, length].float(), TOLERANCE[dtype])
        now[:, :, length] = old[:, :, length]
        assert torch.equal(now.nan_to_num(9.0), old.nan_to_num(9.0))  # nothing else is written


@pytest.mark.parametrize("length", [0, 1, 15, 40, 79])  # none before it, few, odd, many, the last slot
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
def test_how_much_is_filled(device, length, heads):
    check(problem(device, H=heads[0], G=heads[1], length=length))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("K", [20, 64])
@pytest.mark.parametrize("rotary", [True, False])
def test_dtypes_and_sizes(device, dtype, heads, K, rotary):
    check(problem(device, dtype, B=2, H=heads[0], G=heads[1], K=K, offset=(0, 9), rotary=rotary))


@pytest.mark.parametrize("shape", [{"K": 2}, {"K": 256, "C": 40, "length": 39}, {"K": 5, "rotary": False},
                                   {"H": 20, "G": 1, "K": 6}])  # fmt: skip
def test_small_and_large_heads(device, shape):
    check(problem(device, **shape))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("offset", [(0, 40, 39), (3, 17, 32), (41,)])  # a row that begins with this token, and later
def test_left_padding(device, heads, offset):
    check(problem(device, B=3, H=heads[0], G=heads[1], offset=offset))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1)])
@pytest.mark.parametrize("programs", [1, 3, 5, 1000])
def test_slots_shared_by_any_number_of_programs(device, heads, programs, monkeypatch):
    monkeypatch.setattr(attention_step_module, "_PROGRAMS", programs)
    monkeypatch.setattr(attention_step_module, "_MOST_SLOTS", 16)
    monkeypatch.setattr(attention_step_module, "_MERGED", 2)
    for length in (0, 20, 150):
        check(problem(device, H=heads[0], G=heads[1], C=160, length=length, offset=(length // 3,)))


def test_programs_follow_from_the_shapes_alone(device, monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: seen.append(grid)

    for name in ("_part_kernel", "_merge_kernel"):
        monkeypatch.setattr(attention_step_module, name, Kernel())
    for length in (0, 100, 9_999):
        buffer = torch.empty(2, 8, 10_000, 128, device="meta")
        q, k = torch.empty(2, 8, 128, device="meta"), torch.empty(2, 8, 128, device="meta")
        attention_step(q, k, k, buffer, buffer, torch.tensor(length), torch.zeros(2, dtype=torch.int64))
    assert len(set(seen)) == 2 and seen[0] == (33, 16)  # 528 programs


def test_angles_far_into_a_sequence(device):
    """A negative offset stands for the tokens before: the row's position is length - offset."""
    check(problem(device, K=32, offset=(-130_000,)))


def test_takes_slices_of_a_projection(device):
    arguments = problem(device, B=2, H=4, G=2)
    parts = [arguments[name].flatten(1) for name in "qkv"]
    views = torch.cat(parts, dim=1).split([part.shape[1] for part in parts], dim=1)  # of [B, (H + 2G) K]
    check({**arguments, **{name: view.unflatten(1, (-1, 16)) for name, view in zip("qkv", views, strict=True)}})


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_large_scores(device, heads):
    arguments = problem(device, H=heads[0], G=heads[1])
    arguments["q"] *= 1e4
    check(arguments)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_in_the_query_stays_in_its_head(device):
    arguments = problem(device, B=2, H=4)
    expected = attention_step(**copied(arguments))
    arguments["q"][0, 1] = torch.nan
    actual = attention_step(**arguments)
    assert actual[0, 1].isnan().all()
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[0, [0, 2, 3]], expected[0, [0, 2, 3]])


def test_what_it_cannot_take_is_refused(device):
    assert fits(head_dim=256, queries=32) == ""
    with pytest.raises(ValueError, match="attention_step takes at most 256 channels a head, got 258"):
        attention_step(**problem(device, K=258))
    with pytest.raises(ValueError, match="at most 32 queries that share a key, got 33"):
        attention_step(**problem(device, H=33, G=1, K=2))
    arguments = problem(device)
    with pytest.raises(ValueError, match="contiguous torch.float32"):
        attention_step(**{**arguments, "keys": arguments["keys"].mT.contiguous().mT})
    with pytest.raises(ValueError, match="contiguous torch.float32"):
        attention_step(**{**arguments, "values": arguments["values"].half()})
    del arguments["frequencies"]
    with pytest.raises(Unsupported, match="float16"):
        own.attention_step(**{**arguments, "values": arguments["values"].half()})
    arguments = problem(device, K=258)
    del arguments["frequencies"]
    with pytest.raises(Unsupported, match="256 channels a head"):
        own.attention_step(**arguments)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("theta", [THETA, None])
def test_the_adapter_does_what_the_torch_form_does(device, heads, theta):
    arguments = problem(device, B=3, H=heads[0], G=heads[1], offset=(0, 40, 45), rotary=False)
    del arguments["frequencies"]
    for name in ("keys", "values"):
        arguments[name].nan_to_num_(0.0)
    theirs = copied(arguments)
    expected = attention_step_torch(**theirs, rope_theta=theta)
    assert_close(own.attention_step(**arguments, rope_theta=theta), expected)
    assert_close(arguments["keys"], theirs["keys"])
    assert torch.equal(arguments["values"], theirs["values"])


@pytest.mark.parametrize("options", [{"num_heads": 2}, {"num_heads": 4, "num_kv_heads": 2, "bias": True}])
def test_a_model_decodes_through_it(device, options, monkeypatch):
    model = make_model("attention", mixer_args=options).to(device)
    known, steps = plain_loop(model, device), []
    kernel = lambda *args, **kwargs: steps.append(args) or own.attention_step(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(attention, "attention_step", kernel)
    assert_steps_agree(model, *known)
    assert len(steps) == 8 * 2
