"""When a step may be captured, and that nothing of it leaks where it may not; the capture itself is tested on a GPU.

The step that is captured, its buffers and what happens once they are full run here as they are, without a graph.
"""

import copy
import pickle

import pytest
import torch
from conftest import SMALL_ARGS, VOCAB, make_model
from decoding_checks import WithoutGraph, generated, ids

from lrm_recall import RecurrentCache, RecurrentLM, RecurrentLMConfig, decode
from lrm_recall.decode import Decoder, Step, can_capture, capacity_for, fingerprint
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.memory import DenseMemory


def make(mixer="gla", **changes):
    args = SMALL_ARGS.get(mixer, {})
    return RecurrentLM(RecurrentLMConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, mixer=mixer,
                                         mixer_args=args, **changes)).eval()


@pytest.mark.parametrize(
    ("mixer", "captured"),
    [("gla", True), ("mamba2", True), ("mamba", True), ("rwkv5", True), ("h3", True), ("baseconv", True),
     ("attention", True), ("hyena", False)],
)  # fmt: skip
def test_states_of_constant_size_can_be_captured(mixer, captured):
    assert can_capture(make(mixer)) is captured


@pytest.mark.parametrize(("mixer", "captured"), [("gla", True), ("attention", True), ("hyena", False)])
def test_retrieval_is_captured_where_the_mixer_beside_it_is(mixer, captured):
    assert can_capture(make(mixer, resona={"layers": [0], "chunk_size": 4})) is captured


def test_hooks_are_not_captured():
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


RETRIEVAL = {
    "place": {"layers": [0, 1], "chunk_size": 4},
    "linear": {"layers": [1], "chunk_size": 3, "top_k": 4, "encoder": "linear", "alpha": "learned", "num_heads": 2},
    "no gate": {"layers": [0], "chunk_size": 2, "top_k": 2, "encoder": "mean", "gate": "none", "memory_norm": False},
}


@pytest.fixture(params=["gla", "mamba2", "retnet", "attention"])
def mixer(request):
    return request.param


@pytest.fixture(params=RETRIEVAL)
def model(mixer, request, monkeypatch):
    monkeypatch.setattr(decode, "_LEAST_ROOM", 4)  # buffers of 8, 16, ... tokens
    torch.manual_seed(1)
    model = make(mixer, resona=RETRIEVAL[request.param], initializer_range=0.3, pad_token_id=0)
    model._decoder = WithoutGraph()
    return model


@pytest.mark.parametrize("prompt", [(1, 1), (2, 3), (1, 22), (3, 31)])  # below a chunk, across chunks and capacities
def test_a_step_on_buffers_gives_the_tokens_of_the_plain_loop(model, prompt):
    expected = generated(model, ids(*prompt), graph=False)
    assert expected[:, prompt[1] :].unique().numel() > 3  # not one token for ever
    assert torch.equal(generated(model, ids(*prompt), graph=True), expected)
    assert 1 < model._decoder.made < 5


def test_prefill_then_steps_equal_the_full_forward(model):
    tokens = ids(2, 40)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        outputs = model(tokens[:, :9], use_cache=True)
        logits = [outputs.logits]
        for t in range(9, 40):
            logits.append(model(tokens[:, t : t + 1], past_key_values=outputs.past_key_values).logits)
    assert model._decoder.made
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-4, atol=1e-4)


def test_rows_padded_on_the_left(model):
    prompt, mask = ids(3, 14), torch.ones(3, 14, dtype=torch.int64)
    mask[0, :7], mask[2, :13] = 0, 0
    expected = generated(model, prompt, graph=False, mask=mask)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask), expected)


def test_beam_search(model):
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    expected = generated(model, prompt, graph=False, mask=mask, num_beams=3)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask, num_beams=3), expected)


def test_two_caches_in_turn_and_longer_inputs_between(model):
    prompts, pieces = [ids(1, 6), ids(1, 17)], [1, 1, 5, 1, 1, 1, 7, 1]
    rows = [torch.cat([prompt, ids(1, sum(pieces))], 1) for prompt in prompts]
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits for row in rows]
        caches = [model(prompt, use_cache=True).past_key_values for prompt in prompts]
        for piece in pieces:
            for row, full, cache in zip(rows, expected, caches, strict=True):
                start = cache.length
                logits = model(row[:, start : start + piece], past_key_values=cache).logits
                torch.testing.assert_close(logits, full[:, start : start + piece], rtol=1e-4, atol=1e-4)


def test_a_batch_cut_in_the_middle(model):
    prompt = ids(3, 11)
    with torch.no_grad():
        full = model(prompt, use_cache=False).logits
        cache = model(prompt[:, :5], use_cache=True).past_key_values
        for t in range(5, 8):
            model(prompt[:, t : t + 1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1]))
        for t in range(8, 11):
            logits = model(prompt[1:2, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits, full[1:2, t : t + 1], rtol=1e-4, atol=1e-4)


def test_the_cache_looks_as_without_buffers(model):
    prompt = ids(2, 7)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    caches = []
    for graph in (False, True):
        model.cuda_graph = graph
        with torch.no_grad():
            cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
            for t in range(9):
                model(prompt[:, t % 7, None], past_key_values=cache)
        caches.append(cache)
    plain, buffered = caches
    assert plain.nbytes() == buffered.nbytes() and torch.equal(plain.ids, buffered.ids)
    for ours, theirs in zip(buffered.layers, plain.layers, strict=True):
        assert ours.keys() == theirs.keys()
        for name, state in ours.items():
            torch.testing.assert_close(state, theirs[name], rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_captured_once():
    for length in (1, 511, 1023, 131_071, 131_072, 1_000_000):
        capacity = capacity_for(length)
        assert length + 512 <= capacity <= max(2048, length * 1.25)
        assert capacity_for(capacity) > capacity


def test_a_model_without_retrieval_never_outgrows_its_buffers():
    model = make()
    with torch.no_grad():
        step = Step(model, model(ids(2, 5), use_cache=True).past_key_values)
    assert step.has_room(2, 1 << 40) and not step.has_room(3, 5)


def test_cached_bytes_of_a_token():
    """Three layers of hidden size 2,048 in bf16 with chunks of 64: the ids, and an embedding a layer and chunk."""
    held = {}
    for encoder, options in {"linear": {"encoder_dim": 128}, "place": {}}.items():
        layer = Resona(torch.nn.Identity(), 2048, chunk_size=64, encoder=encoder, num_heads=16, **options).bfloat16()
        memory, sizes = torch.zeros(1, 512, 2048, dtype=torch.bfloat16), []
        for length in (128, 512):
            cache = RecurrentCache(3)
            cache.append_ids(torch.zeros(1, length, dtype=torch.int64))
            for slot in cache.layers:
                layer.chunk_embeddings(DenseMemory(memory[:, :length]), slot)
            sizes.append(cache.nbytes())
        held[encoder] = (sizes[1] - sizes[0]) / (512 - 128)
    assert held == {"linear": 8 + 3 * 4, "place": 8 + 3 * 64}  # the paper's keys and values are 24 KB
