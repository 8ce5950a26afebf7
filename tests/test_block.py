"""What a block does for speed and memory changes nothing: pieces of a prompt, joint projections, norms that add."""

import pytest
import torch
from closeness import assert_close
from torch import nn

from lrm_recall import RecurrentLM, RecurrentLMConfig, model
from lrm_recall.model import SwiGLU
from lrm_recall.norms import LayerNorm, RMSNorm
from lrm_recall.ops.linear import plain, project
from lrm_recall.ops.loss import IGNORED, cross_entropy


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_a_long_prompt_goes_through_the_mlp_in_pieces(monkeypatch, length):
    mlp, x = SwiGLU(16, 40), torch.randn(2, length, 16)
    whole = mlp(x)
    monkeypatch.setattr(model, "_MLP_PIECE", 8)
    assert_close(mlp(x), whole)


def test_an_adapter_in_the_mlp_is_not_passed_over():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp, x = SwiGLU(16, 40), torch.randn(2, 3, 16)
    before = mlp(x)
    adapted = Doubled(40, 16, bias=False)
    adapted.load_state_dict(mlp.down_proj.state_dict())
    mlp.down_proj = adapted
    assert_close(mlp(x), 2 * before)


def test_project_is_each_layer():
    layers, x = [nn.Linear(8, 3, bias=False), nn.Linear(8, 5)], torch.randn(2, 1, 8)
    for y, layer in zip(project(x, *layers), layers, strict=True):
        assert torch.equal(y, layer(x))


def test_plain_layers_are_weights_alone():
    layer = nn.Linear(4, 4, bias=False)
    assert plain(layer)
    assert not plain(layer, nn.Linear(4, 4))
    assert not plain(nn.Identity())
    layer.register_forward_hook(lambda *_: None)
    assert not plain(layer)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_norm_that_adds(norm, stream):
    layer = norm(24, eps=1e-5).bfloat16()
    nn.init.normal_(layer.weight)
    x, residual = torch.randn(2, 5, 24).bfloat16(), torch.randn(2, 5, 24).to(stream)
    y, total = layer.add(x, residual)
    assert y.dtype == torch.bfloat16 and total.dtype == stream
    assert_close(total.float(), (residual + x).float(), 1e-6)
    expected = norm(24, eps=1e-5)
    expected.load_state_dict({name: p.float() for name, p in layer.state_dict().items()})
    assert_close(y.float(), expected(residual.float() + x.float()), 2e-2)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_stream_in_float32_of_a_model_in_bfloat16(norm):
    torch.manual_seed(0)
    config = RecurrentLMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, mixer_args={"num_heads": 2},
                               norm=norm, residual_in_fp32=True, initializer_range=0.1)
    reference = RecurrentLM(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    expected = reference(ids).logits
    low = RecurrentLM(config).eval()
    low.load_state_dict(reference.state_dict())
    outputs = low.bfloat16()(ids, output_hidden_states=True)
    assert {h.dtype for h in outputs.hidden_states} == {torch.float32}
    assert_close(outputs.logits.float(), expected, 3e-2)


def test_hidden_states_stay_as_they_were_handed_out():
    config = RecurrentLMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, mixer_args={"num_heads": 2})
    lm, ids = RecurrentLM(config).eval(), torch.randint(0, 50, (1, 9))
    with torch.no_grad():  # where blocks add in place
        quick = lm(ids, output_hidden_states=True).hidden_states
    slow = lm(ids, output_hidden_states=True).hidden_states
    for a, b in zip(quick, slow, strict=True):
        assert_close(a, b.detach())


def test_cross_entropy_of_positions():
    logits, labels = torch.randn(6, 11, requires_grad=True), torch.tensor([1, IGNORED, 3, 0, 10, IGNORED])
    losses = cross_entropy(logits, labels)
    assert losses[1] == losses[5] == 0
    assert_close(losses.sum() / 4, nn.functional.cross_entropy(logits, labels))


class TestInitialWeights:
    """transformers passes over modules without parameters of their own in what it takes for custom code."""

    def test_of_mixers_made_of_layers_alone(self):
        config = RecurrentLMConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, mixer="deltanet",
                                   mixer_args={"num_heads": 2}, initializer_range=0.02)
        weight = RecurrentLM(config).model.layers[0].mixer.q_conv1d.weight
        assert 0.01 < weight.std() < 0.03  # torch's own would be 0.29

    def test_of_encoders_without_a_gate(self):
        config = RecurrentLMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, mixer_args={"num_heads": 2},
                                   resona={"layers": [0], "chunk_size": 4, "encoder": "linear", "gate": "none"})
        encoder = RecurrentLM(config).model.layers[0].mixer.encoder
        assert torch.equal(encoder.chunk_proj.weight, encoder.query_proj.weight)
        assert_close(encoder.chunk_proj.weight @ encoder.chunk_proj.weight.T, torch.eye(32))

    def test_not_of_what_was_loaded(self, tmp_path):
        config = RecurrentLMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, mixer_args={"num_heads": 2})
        lm = RecurrentLM(config)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.normal_()
        lm.save_pretrained(tmp_path)
        for name, parameter in RecurrentLM.from_pretrained(tmp_path).named_parameters():
            assert torch.equal(parameter, lm.get_parameter(name)), name
