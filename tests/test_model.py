"""RecurrentLM with every mixer and several Resona settings: decoding, padding, causality, saving, generation."""

import pytest
import torch
from conftest import RESONA, SMALL_ARGS, VOCAB, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall import RecurrentCache, RecurrentLM

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prompt", [1, 2, 6, 7, 12])  # below a chunk, a chunk, multiples of it, odd
def test_prefill_then_token_by_token_equals_the_full_forward(model, prompt):
    ids = random_ids(2, 19)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        outputs = model(ids[:, :prompt], use_cache=True)
        logits = [outputs.logits]
        for t in range(prompt, ids.shape[1]):
            outputs = model(ids[:, t : t + 1], past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **TOLERANCE)


@pytest.mark.parametrize("pieces", [(5, 9, 5), (1, 17, 1), (12, 7)])
def test_prefill_in_pieces_equals_the_full_forward(model, pieces):
    ids = random_ids(2, sum(pieces))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache, logits = None, []
        for piece in ids.split(pieces, dim=1):
            outputs = model(piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **TOLERANCE)


def test_rows_of_different_lengths_decode_as_if_alone(model):
    lengths, total, new = (11, 6, 1, 8), 11, 9
    rows = [random_ids(1, length + new, seed) for seed, length in enumerate(lengths)]
    prompts = torch.cat([torch.nn.functional.pad(r[:, :n], (total - n, 0)) for r, n in zip(rows, lengths, strict=True)])
    mask = torch.tensor([[0] * (total - n) + [1] * n for n in lengths])
    with torch.no_grad():
        outputs = model(prompts, attention_mask=mask, use_cache=True)
        logits = [outputs.logits]
        for t in range(new):
            step = torch.cat([row[:, n + t : n + t + 1] for row, n in zip(rows, lengths, strict=True)])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            outputs = model(step, attention_mask=mask, past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
        batched = torch.cat(logits, dim=1)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            torch.testing.assert_close(batched[i, total - length :], model(row, use_cache=False).logits[0], **TOLERANCE)


def test_right_padding_changes_no_real_position(model):
    ids = random_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(padded[0, :7], model(ids[:1, :7], use_cache=False).logits[0], **TOLERANCE)


@settings(deadline=None, max_examples=60)
@given(mixer=st.sampled_from(sorted(SMALL_ARGS)), resona=st.sampled_from(list(RESONA)), length=st.integers(1, 40),
       seed=st.integers(0, 1000), data=st.data())
def test_no_position_sees_its_future(mixer, resona, length, seed, data):
    model = make_model(mixer, resona, seed=seed)
    t = data.draw(st.integers(0, length - 1))
    embeds = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeds)
    assert gradient[0, : t + 1].abs().sum() > 0
    assert gradient[0, t + 1 :].abs().sum() == 0  # exactly


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = RecurrentLM.from_pretrained(tmp_path).eval()
    for name in ("mixer", "mixer_args", "layer_overrides", "resona", "intermediate_size"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    for (name, old), new in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    ids = random_ids(1, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)  # another alignment rounds differently


def test_tied_embeddings_are_one_tensor_after_loading(tmp_path):
    make_model("gla", tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = RecurrentLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight


def test_greedy_generation_with_left_padding_is_what_each_row_gives_alone(model):
    rows = [random_ids(1, 8, 1), random_ids(1, 3, 2)]
    prompts = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (5, 0))])
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    together = model.generate(prompts, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = row
        for _ in range(10):  # the plain loop, without a cache
            alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(together[i, -10:], alone[0, -10:])


def test_sampling_and_beams_run_from_the_cache(model):
    prompt = random_ids(2, 5)
    torch.manual_seed(0)
    first = model.generate(prompt, max_new_tokens=6, do_sample=True, pad_token_id=0)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(prompt, max_new_tokens=6, do_sample=True, pad_token_id=0, use_cache=False))
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_nothing(model):
    ids = random_ids(2, 12)
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()  # the name that older transformers know too
    model(ids, labels=ids).loss.backward()
    for ours, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_is_that_of_the_next_token():
    model, ids = make_model("gla"), random_ids(2, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    outputs = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_to_keep():
    model, ids = make_model("gla"), random_ids(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])


def test_bf16_forward_and_backward_are_finite(model):
    model = model.to(torch.bfloat16)
    model(random_ids(2, 13), labels=random_ids(2, 13)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_precomputed_chunks_through_the_model():
    model, ids = make_model("gla", "mean"), random_ids(2, 12)
    none = torch.full((2, 12, 1), -1)
    base = RecurrentLM(type(model.config)(**{**model.config.to_dict(), "resona": None})).eval()
    base.load_state_dict({name.replace("mixer.mixer.", "mixer."): tensor for name, tensor in model.state_dict().items()
                          if "mixer.mixer." in name or ".mixer." not in name})
    assert torch.equal(model(ids, chunk_indices=none).logits, base(ids).logits)
    with pytest.raises(ValueError, match="wholly before"):
        model(ids, chunk_indices={1: torch.full((2, 12, 1), 3)})


def test_the_cache_keeps_no_keys_and_values():
    length, model = 60, make_model("gla", "mean")
    outputs = model(random_ids(1, length), use_cache=True)
    bare = make_model("gla")(random_ids(1, length), use_cache=True).past_key_values.nbytes()
    ids, chunks = 8 * length, 2 * (length // 3) * 16 * 4  # two layers of [N, E] float32 embeddings
    assert outputs.past_key_values.nbytes() - bare == ids + chunks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "either input_ids or inputs_embeds"),
     ({"input_ids": random_ids(1, 4), "attention_mask": torch.ones(1, 3)}, r"attention_mask must be \[batch, 4\]"),
     ({"input_ids": random_ids(1, 4), "attention_mask": torch.tensor([[1, 0, 1, 1]]), "use_cache": True},
      "0 after a 1"),
     ({"inputs_embeds": torch.randn(1, 4, 16), "use_cache": True}, "needs input_ids"),
     ({"input_ids": random_ids(1, 4)[0]}, r"input_ids must be \[batch, length\]"),
     ({"input_ids": random_ids(1, 4), "chunk_indices": {9: torch.full((1, 4, 1), -1)}}, "for the Resona layers")],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model("gla", "mean")(**arguments)


def test_a_row_that_has_begun_is_not_padded_again():
    model = make_model("gla")
    cache = model(random_ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="already begun"):
        model(random_ids(2, 2), attention_mask=torch.tensor([[0, 1], [1, 1]]), past_key_values=cache)


def test_an_empty_cache_may_be_handed_in():
    model = make_model("gla")
    outputs = model(random_ids(1, 4), past_key_values=RecurrentCache(2))
    assert outputs.past_key_values.get_seq_length() == 4
