"""When a step may be captured, and that nothing of it leaks where it may not; the capture itself is tested on a GPU."""

import copy
import pickle

import pytest
import torch
from conftest import SMALL_ARGS, VOCAB, make_model

from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.decode import Decoder, can_capture, fingerprint


def make(mixer="gla", **changes):
    args = SMALL_ARGS.get(mixer, {})
    return RecurrentLM(RecurrentLMConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, mixer=mixer,
                                         mixer_args=args, **changes)).eval()


@pytest.mark.parametrize(
    ("mixer", "captured"),
    [("gla", True), ("mamba2", True), ("mamba", True), ("rwkv5", True), ("h3", True), ("baseconv", True),
     ("attention", False), ("hyena", False)],
)  # fmt: skip
def test_states_of_constant_size_can_be_captured(mixer, captured):
    assert can_capture(make(mixer)) is captured


def test_retrieval_and_hooks_are_not_captured():
    assert not can_capture(make(resona={"layers": [0], "chunk_size": 4}))
    model = make()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not can_capture(model)
    handle.remove()
    assert can_capture(model)


def test_the_fingerprint_tells_changed_weights():
    model = make()
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    changed = fingerprint(model)
    assert changed != before
    model.model.layers[0].mixer.q_proj.weight = torch.nn.Parameter(torch.zeros(16, 32))
    assert fingerprint(model) != changed


def test_on_a_cpu_the_model_is_run():
    model = make()
    ids = torch.randint(0, VOCAB, (1, 5))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert model._decoder.step(model, ids[:, :1], cache) is None


def test_a_decoder_is_not_copied_with_its_model():
    model = make()
    assert copy.deepcopy(model)._decoder is not model._decoder
    assert isinstance(pickle.loads(pickle.dumps(Decoder())), Decoder)


def test_the_mask_is_dropped_once_the_prompt_is_read():
    model, seen = make_model("gla"), []
    prompt = torch.randint(1, VOCAB, (2, 6))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True)
    model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen[0] is not None and seen[1:] == [None, None]
