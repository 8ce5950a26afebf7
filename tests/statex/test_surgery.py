"""StateX: sizes of the papers' models, what is kept, what starts afresh, and that the result is an ordinary model."""

import pytest
import torch
from conftest import VOCAB, make_model

from lrm_recall import RecurrentLM, RecurrentLMConfig, Size, choose_layers, expand_state, merge_heads, widen_state

IDS = torch.randint(1, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def gla_1b() -> RecurrentLM:
    """The shape of fla-hub/gla-1.3B-100B, without its weights."""
    with torch.device("meta"):
        return RecurrentLM(RecurrentLMConfig(
            vocab_size=32000, hidden_size=2048, num_hidden_layers=24, mixer="gla", mixer_args={"num_heads": 4}))


def mamba2_1b() -> RecurrentLM:
    """The shape of AntonV/mamba2-1.3b-hf, without its weights."""
    with torch.device("meta"):
        return RecurrentLM(RecurrentLMConfig(
            vocab_size=50288, hidden_size=2048, num_hidden_layers=48, mixer="mamba2", mlp="none",
            mixer_args={"state_size": 128, "head_dim": 64}, tie_word_embeddings=True))


def test_gla_grows_by_half_with_no_new_parameter():
    model = gla_1b()
    before, after = Size.of(model), Size.of(expand_state(model, 4))
    assert before.state == 24 * 4 * 256 * 512 == 12_582_912  # 12.58M
    assert after.state == 20 * 4 * 256 * 512 + 4 * 1024 * 2048 == 18_874_368  # 18.87M
    assert before.parameters == 1_365_514_240  # 1.365B
    # the norm weight is the one tensor that heads shared: 3 x 512 more elements a layer
    assert after.parameters - before.parameters == 4 * 3 * 512
    assert before.growth(after) == "state 12.58M -> 18.87M (1.50x), parameters 1.366B -> 1.366B (+6,144)"


@pytest.mark.parametrize(("m", "state", "parameters"), [(4, 31_457_280, 1.350), (8, 37_748_736, 1.356)])
def test_mamba2_in_both_readings_of_table_2(m, state, parameters):
    """Its state says 8 layers (1.5 times), its parameters say 4 (1.350B)."""
    model = mamba2_1b()
    before, after = Size.of(model), Size.of(expand_state(model, m))
    assert before.state == 48 * 64 * 64 * 128 == 25_165_824
    assert after.state == state
    assert round(before.parameters / 1e9, 3) == 1.344
    assert round(after.parameters / 1e9, 3) == parameters
    assert (after.parameters - before.parameters) / before.parameters < 0.01


@pytest.mark.parametrize(("layers", "m", "chosen"), [(24, 4, [0, 6, 12, 18]), (48, 4, [0, 12, 24, 36]), (5, 2, [0, 2]),
                                                     (48, 8, [0, 6, 12, 18, 24, 30, 36, 42]), (3, 3, [0, 1, 2])])
def test_chosen_layers(layers, m, chosen):
    assert choose_layers(layers, m) == chosen


@pytest.mark.parametrize("m", [0, 5])
def test_too_few_or_too_many_layers(m):
    with pytest.raises(ValueError, match=f"m must lie between 1 and the number of layers 4, got {m}"):
        choose_layers(4, m)


@pytest.mark.parametrize(("mixer", "resona"), [("gla", "none"), ("mamba2", "none"), ("gla", "mean")])
def test_the_expanded_model_is_an_ordinary_one(mixer, resona, tmp_path):
    model = make_model(mixer, resona)
    expanded = expand_state(model, 1)
    assert expanded.state_size() > model.state_size()
    expanded.save_pretrained(tmp_path)
    loaded = RecurrentLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, expanded(IDS).logits)
    full = expanded(IDS, use_cache=False).logits
    outputs = expanded(IDS[:, :5], use_cache=True)
    rest = expanded(IDS[:, 5:], past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(rest, full[:, 5:], rtol=1e-4, atol=1e-4)
    expanded(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expanded.parameters() if p.requires_grad)


@pytest.mark.parametrize("mixer", ["gla", "mamba2"])
def test_the_given_model_is_left_alone(mixer):
    model = make_model(mixer)
    before, config = model(IDS).logits, model.config.to_dict()
    expanded = expand_state(model, 2)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(IDS).logits, before) and model.config.to_dict() == config


def test_merging_with_inheritance_keeps_every_projection_and_tiles_the_norm():
    model = make_model("gla")
    old, new = model.model.layers[0].mixer, merge_heads(model, [0], start="inherit").model.layers[0].mixer
    for name, tensor in old.state_dict().items():
        if name != "g_norm_swish_gate.weight":
            assert torch.equal(new.state_dict()[name], tensor), name
    assert torch.equal(new.g_norm_swish_gate.weight, old.g_norm_swish_gate.weight.repeat(2))


def test_reinitialising_gla_touches_the_token_mixing_and_its_norm_alone():
    model = make_model("gla")
    with torch.no_grad():
        model.model.layers[0].mixer_norm.weight.fill_(3.0)
    expanded = merge_heads(model, [0])
    assert torch.equal(expanded.model.layers[0].mixer_norm.weight, torch.ones(16))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.0.mixer" not in name}
    for name, tensor in kept.items():
        assert torch.equal(expanded.state_dict()[name], tensor), name
    assert not torch.equal(expanded.model.layers[0].mixer.q_proj.weight, model.model.layers[0].mixer.q_proj.weight)


def test_reinitialising_mamba2_touches_a_b_c_and_dt_bias_alone():
    model = make_model("mamba2")
    old, new = model.model.layers[0].mixer, widen_state(model, [0]).model.layers[0].mixer
    inner, heads = 32, 4
    for name in ("D", "norm.weight", "out_proj.weight"):
        assert torch.equal(new.state_dict()[name], old.state_dict()[name]), name
    assert torch.equal(new.in_proj.weight[: 2 * inner], old.in_proj.weight[: 2 * inner])  # z and x
    assert torch.equal(new.in_proj.weight[-heads:], old.in_proj.weight[-heads:])  # dt
    assert torch.equal(new.conv1d.weight[:inner], old.conv1d.weight[:inner])
    assert new.in_proj.weight.shape[0] == 2 * inner + 2 * 4 * 8 + heads
    assert not torch.equal(new.in_proj.weight[2 * inner : 2 * inner + 8], old.in_proj.weight[2 * inner : 2 * inner + 8])


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize(("new_rows", "same", "learns"), [("zero_B", True, True), ("zero_C", True, True),
                                                          ("zero_both", True, False), ("fresh", False, True)])
def test_inheriting_mamba2(n_groups, new_rows, same, learns):
    """Zeros in B or in C keep the function and get a gradient; zeros in both keep it and get none."""
    args = {"head_dim": 8, "state_size": 4, "n_groups": n_groups, "chunk_size": 8}
    model = make_model("mamba2", mixer_args=args)
    expanded = widen_state(model, [0], 3, start="inherit", new_rows=new_rows)
    before, after = model(IDS).logits, expanded(IDS).logits
    assert (((after - before).norm() / before.norm()) < 1e-5).item() is same
    expanded(IDS, labels=IDS).loss.backward()
    inner, state = 32, 4
    gradient = expanded.model.layers[0].mixer.in_proj.weight.grad[2 * inner : -4].unflatten(0, (2, n_groups, 3 * state))
    assert bool((gradient[:, :, state:].abs().sum() > 0).item()) is learns


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: merge_heads(make_model("mamba2"), [0]), "for mixer 'gla', the model has 'mamba2'"),
     (lambda: widen_state(make_model("gla"), [0]), "for mixer 'mamba2', the model has 'gla'"),
     (lambda: merge_heads(make_model("gla"), [2]), r"distinct numbers from 0 to 1, got \[2\]"),
     (lambda: merge_heads(make_model("gla"), [0, 0]), r"got \[0, 0\]"),
     (lambda: merge_heads(make_model("gla"), []), r"got \[\]"),
     (lambda: merge_heads(make_model("gla"), [0], start="keep"), "'reinitialise' or 'inherit', got 'keep'"),
     (lambda: widen_state(make_model("mamba2"), [0], 1), "factor must be at least 2, got 1"),
     (lambda: widen_state(make_model("mamba2"), [0], start="inherit", new_rows="zeros"), "new_rows must be"),
     (lambda: expand_state(make_model("baseconv")), "m must lie|mixers 'gla' and 'mamba2'"),
     (lambda: expand_state(make_model("attention"), 1), "this model has 'attention'")],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
