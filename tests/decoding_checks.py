"""What tests of decoding share: a decoder that runs the step that a GPU would capture, and the plain loop beside it."""

import torch
from conftest import VOCAB

from lrm_recall.decode import Decoder, Step

NEW = 21
_READ, _TOKENS = 7, 15  # of `plain_loop`: tokens of the prompt, and in all


class WithoutGraph(Decoder):
    """Runs the step that a GPU would capture."""

    made = 0

    def _runs(self, ids):
        return True

    def _capture(self, model, cache):
        self.made += 1
        return Step(model, cache)


def ids(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(sum(shape)))


def generated(model, prompt, graph, mask=None, **options):
    model.cuda_graph = graph
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


@torch.no_grad()
def plain_loop(model, device):
    """Tokens of two rows, one padded; logits behind those after the prompt, token by token; a cache of the prompt."""
    tokens = torch.randint(1, VOCAB, (2, _TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    prompt, mask = tokens[:, :_READ], torch.ones_like(tokens[:, :_READ])
    mask[1, :4] = 0
    model.cuda_graph = False
    cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
    expected = [model(token, past_key_values=cache).logits for token in tokens[:, _READ:].split(1, dim=1)]
    return tokens, expected, model(prompt, attention_mask=mask, use_cache=True).past_key_values


@torch.no_grad()
def assert_steps_agree(model, tokens, expected, cache):
    """A `Step` gives the logits of the plain loop; arguments as `plain_loop` gives them."""
    step = Step(model, cache)
    for token, logits in zip(tokens[:, _READ:].split(1, dim=1), expected, strict=True):
        torch.testing.assert_close(step.step(model, token, cache), logits, rtol=1e-4, atol=1e-4)
