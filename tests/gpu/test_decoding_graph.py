"""Decoding through a CUDA graph gives what the plain loop gives, whatever happens to the cache in between."""

import copy

import pytest
import torch

from lrm_recall import RecurrentLM, RecurrentLMConfig, decode

ARGS = {
    "gla": {"num_heads": 2},
    "deltanet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 32},
    "retnet": {"num_heads": 2},
    "rwkv4": {},
    "rwkv5": {"head_dim": 16},
    "mamba": {},
    "mamba2": {"head_dim": 32, "state_size": 32},
    "h3": {},
    "attention": {"num_heads": 2},
}
VOCAB, NEW = 128, 24


def make(mixer, **changes):
    torch.manual_seed(0)
    config = RecurrentLMConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, mixer=mixer, mixer_args=ARGS.get(mixer, {}),
        initializer_range=0.2, pad_token_id=0, **changes,
    )  # fmt: skip
    return RecurrentLM(config).cuda().eval()


@pytest.fixture(params=list(ARGS))
def model(request):
    return make(request.param)


def ids(*shape):
    return torch.randint(1, VOCAB, shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def generated(model, prompt, graph, mask=None, **options):
    model.cuda_graph = graph
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("batch", [1, 3, 6])  # 6: more rows than the decoding kernels take
def test_same_tokens_as_the_plain_loop(model, batch):
    prompt = ids(batch, 70)
    expected = generated(model, prompt, graph=False)
    assert expected[:, 70:].unique().numel() > 3  # not one token for ever
    assert torch.equal(generated(model, prompt, graph=True), expected)
    assert torch.equal(generated(model, prompt[:, :5], graph=True), generated(model, prompt[:, :5], graph=False))


def test_rows_padded_on_the_left(model):
    prompt, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.int64, device="cuda")
    mask[0, :7], mask[2, :19] = 0, 0
    expected = generated(model, prompt, graph=False, mask=mask)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask), expected)


def test_two_caches_in_turn(model):
    prompts, caches, tokens = [ids(1, 20), ids(1, 33)], [], []
    with torch.no_grad():
        for prompt in prompts:
            out = model(prompt, use_cache=True)
            caches.append(out.past_key_values)
            tokens.append([out.logits[:, -1:].argmax(-1)])
        for _ in range(NEW - 1):
            for cache, row in zip(caches, tokens, strict=True):
                row.append(model(row[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    for prompt, row in zip(prompts, tokens, strict=True):
        assert torch.equal(torch.cat(row, 1), generated(model, prompt, graph=False)[:, prompt.shape[1] :])


def test_beam_search(model):
    prompt = ids(2, 20)
    expected = generated(model, prompt, graph=False, num_beams=3)
    assert torch.equal(generated(model, prompt, graph=True, num_beams=3), expected)


def test_a_batch_cut_in_the_middle(model):
    prompt = ids(3, 20)
    rows = generated(model, prompt, graph=False)[:, 20:]
    model.cuda_graph = True
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        for t in range(4):
            model(rows[:, t : t + 1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1]))
        logits = model(rows[1:2, 4:5], past_key_values=cache).logits
    assert torch.equal(logits[:, -1].argmax(-1), rows[1:2, 5])


def test_weights_changed_in_place(model):
    prompt = ids(1, 20)
    before = generated(model, prompt, graph=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    after = generated(model, prompt, graph=True)
    assert torch.equal(after, generated(model, prompt, graph=False)) and not torch.equal(after, before)


def test_a_copy_of_a_model_that_has_captured(model):
    prompt = ids(1, 20)
    expected = generated(model, prompt, graph=True)
    assert torch.equal(generated(copy.deepcopy(model), prompt, graph=True), expected)


def test_returned_logits_are_the_callers_own():
    model, prompt = make("gla"), ids(1, 20)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        first = model(prompt[:, :1], past_key_values=cache).logits
        kept = first.clone()
        model(prompt[:, 1:2], past_key_values=cache)
    assert torch.equal(first, kept)


def test_a_growing_state_without_buffers_is_decoded_without_a_graph():
    model = make("hyena")
    generated(model, ids(1, 20), graph=True)
    assert model._decoder._graph is None


ATTENTION = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "one key": {"num_heads": 4, "num_kv_heads": 1, "bias": True},
    "no positions": {"num_heads": 2, "rotary": False},
    "window": {"num_heads": 2, "window": 16},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_kinds_of_attention(kind, monkeypatch):
    monkeypatch.setitem(ARGS, "attention", ATTENTION[kind])
    model, prompt, mask = make("attention"), ids(3, 20), torch.ones(3, 20, dtype=torch.int64, device="cuda")
    mask[0, :7], mask[2, :19] = 0, 0
    expected = generated(model, prompt, graph=False, mask=mask)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask), expected)
    assert model._decoder._graph is not None


@pytest.mark.parametrize("resona", [None, {"layers": [0], "chunk_size": 4}])
def test_buffers_of_keys_and_values_that_are_full(resona, monkeypatch):
    monkeypatch.setattr(decode, "_LEAST_ROOM", 4)  # buffers of 8, 16, ... tokens
    model, prompt, captured = make("attention", resona=resona), ids(2, 20), []
    capture = decode.Decoder._capture
    monkeypatch.setattr(decode.Decoder, "_capture", lambda *args: captured.append(1) or capture(*args))
    expected = generated(model, prompt, graph=False)
    assert torch.equal(generated(model, prompt, graph=True), expected)
    assert 2 < len(captured) < 6


@torch.no_grad()
def test_keys_and_values_move_into_the_buffers_layer_by_layer():
    torch.manual_seed(0)
    config = RecurrentLMConfig(vocab_size=VOCAB, hidden_size=512, num_hidden_layers=12, mixer="attention", mlp="none")
    model = RecurrentLM(config).cuda().bfloat16().eval()
    prompt = ids(1, 65_536)
    for _ in range(2):  # kernels are compiled in the first
        model._decoder = decode.Decoder()
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        held = cache.nbytes()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(prompt[:, :1], past_key_values=cache)
        more = torch.cuda.max_memory_allocated() - before
    assert model._decoder._graph is not None
    assert more < 0.45 * held  # room for an eighth more, and a layer twice: not all of it


def test_a_hook_sees_every_token():
    model, seen = make("gla"), []
    model.model.layers[0].mixer.o_proj.register_forward_hook(lambda *_: seen.append(1))
    generated(model, ids(1, 20), graph=True)
    assert len(seen) == NEW
