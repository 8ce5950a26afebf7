"""One token of Resona's retrieval against plain torch, with keys and values written out there."""

import pytest
import torch
from closeness import assert_close
from conftest import make_model
from decoding_checks import assert_steps_agree, plain_loop

from lrm_kernels import resona_step as resona_step_module
from lrm_kernels.resona_step import Weights, encode_newest, fits, mix, resona_step_reference, retrieve
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.libraries import own
from lrm_recall.resona import integrate, search
from lrm_recall.resona import layer as resona_layer
from lrm_recall.resona.memory import TokenMemory

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
VOCAB = 50


def problem(device, dtype, *, B=1, D=32, H=2, U=4, k=2, C=48, positions=None, encoder="place", E=8, gate=True,
            norm=True, alpha=0.5, seed=0):  # fmt: skip
    """Arguments of a step: a table filled up to the new token's chunk, garbage behind it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator)).to(device, dtype)

    linear = encoder == "linear"
    E = E if linear else D
    weights = Weights(
        *(draw(D, D, std=D**-0.5) for _ in range(4)), norm=draw(D) if norm else None, eps=1e-6,
        place=None if encoder == "mean" else draw(U, D), chunk=draw(E, D) if linear else None,
        query=draw(E, D) if linear else None, null=draw(E) if gate else None,
        log_temperature=draw() + 1 if gate else None,
        alpha=alpha if isinstance(alpha, float) else (draw(1, D, std=D**-0.5), draw(1)),
    )  # fmt: skip
    length = C - 1 - seed % 2
    positions = [length - 3 * row for row in range(B)] if positions is None else positions
    length = max(length, *positions, 0)
    table = torch.nn.functional.normalize(draw(B, C // U + 1, E), dim=-1)
    tensors = {
        "x": draw(B, D), "mixed": draw(B, D), "table": table,
        "ids": torch.randint(VOCAB, (B, C), generator=generator).to(device), "embedding": draw(VOCAB, D),
        "length": torch.tensor(length, device=device),
        "offset": torch.tensor([length - position for position in positions], device=device),
    }  # fmt: skip
    return {**tensors, "weights": weights, "top_k": k, "num_heads": H, "chunk_size": U}


def in_float32(arguments):
    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        return type(value)(*map(wide, value)) if isinstance(value, Weights) else (
            tuple(map(wide, value)) if isinstance(value, tuple) else value)  # fmt: skip

    return {name: wide(value) for name, value in arguments.items()}


def resona_step(x, mixed, table, ids, length, offset, embedding, weights, **sizes):
    """The three parts in the order of `lrm_recall.ops.libraries.own`, on one stream."""
    tokens = (ids, length, offset, embedding)
    found = retrieve(x, table, *tokens, weights, **sizes)
    y = mix(found, mixed, weights)  # [B, D]
    encode_newest(table, *tokens, weights, chunk_size=sizes["chunk_size"])
    return y


def check(arguments, dtype=torch.float32):
    expected_arguments = in_float32({**arguments, "table": arguments["table"].clone()})  # a table of its own
    expected = resona_step_reference(**expected_arguments)
    before = arguments["table"].clone()
    actual = resona_step(**arguments)
    assert actual.dtype == dtype and actual.isfinite().all()
    assert_close(actual.float(), expected, TOLERANCE[dtype])
    table = arguments["table"].float()
    assert_close(table, expected_arguments["table"], TOLERANCE[dtype])
    written = (table != before.float()).any(-1)  # [B, N]
    position = arguments["length"] - arguments["offset"]
    complete = (position + 1) % arguments["chunk_size"] == 0
    assert written.sum(1).le(complete).all()  # that chunk alone, and nothing while it is not complete


@pytest.fixture(autouse=True)
def few_programs(device, monkeypatch):
    """The interpreter takes its time for each."""
    if device == "cpu":
        monkeypatch.setattr(resona_step_module, "_ROWS", 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("encoder", ["place", "linear", "mean"])
@pytest.mark.parametrize("gate", [True, False])
def test_every_kind_of_layer(device, dtype, encoder, gate):
    check(problem(device, dtype, encoder=encoder, gate=gate, B=2, D=32, H=4), dtype)


@pytest.mark.parametrize(
    "shape",
    [{"D": 24, "H": 1, "k": 1}, {"D": 30, "H": 3, "U": 3, "k": 5}, {"D": 18, "H": 9, "U": 1, "C": 9, "k": 4},
     {"D": 34, "H": 2, "U": 20, "C": 100, "k": 3, "alpha": "learned"}, {"D": 16, "H": 1, "U": 2, "C": 200, "k": 16},
     {"B": 4, "encoder": "linear", "E": 3}, {"norm": False}, {"encoder": "linear", "E": 70, "D": 20, "B": 3}],
)  # fmt: skip
@pytest.mark.parametrize("gate", [True, False])
def test_shapes(device, shape, gate):
    check(problem(device, torch.float32, gate=gate, **shape))


@pytest.mark.parametrize("gate", [True, False])
def test_sums_that_are_split_over_programs(device, gate, monkeypatch):
    for name, value in (("_LOGIT_BYTES", 64), ("_KEYS", 32), ("_KEY_COLUMNS", 16), ("_COLUMNS", 16),
                        ("_TOKEN_CHANNELS", 16), ("_ENCODED", 64), ("_SEARCHED", 1)):  # fmt: skip
        monkeypatch.setattr(resona_step_module, name, value)
    for encoder in ("place", "linear"):
        check(problem(device, torch.float32, D=44, H=2, U=3, C=120, k=3, encoder=encoder, E=19, gate=gate, seed=1))


@pytest.mark.parametrize("position", [0, 3, 4, 7, 8, 11])
@pytest.mark.parametrize("gate", [True, False])
def test_few_chunks_or_none(device, position, gate):
    arguments = problem(device, torch.float32, k=4, C=12, positions=[position, position // 2], B=2, gate=gate, seed=1)
    check(arguments)
    if position < 4:
        assert torch.equal(resona_step(**arguments), arguments["mixed"])


def test_chunks_that_are_not_visible_are_not_read(device):
    arguments = problem(device, torch.float32, positions=[9])
    expected = resona_step(**arguments)
    arguments["table"][:, 2:] = torch.nan
    assert torch.equal(resona_step(**arguments), expected)


@pytest.mark.parametrize("encoder", ["place", "linear"])
def test_encoding_before_retrieval_or_after_it(device, encoder):
    """The chunk that the new token completes is not visible to it."""
    arguments = problem(device, torch.float32, encoder=encoder, positions=[11, 10], B=2, k=4, alpha="learned")
    first = {**arguments, "table": arguments["table"].clone()}
    expected = resona_step(**arguments)
    assert first["table"].ne(arguments["table"]).any(-1).nonzero().tolist() == [[0, 2]]  # row 0 completes its third
    sizes = {name: first.pop(name) for name in ("top_k", "num_heads", "chunk_size")}
    x, mixed, table, weights = (first.pop(name) for name in ("x", "mixed", "table", "weights"))
    encode_newest(table, **first, weights=weights, chunk_size=sizes["chunk_size"])
    found = retrieve(x, table, **first, weights=weights, **sizes)
    assert torch.equal(mix(found, mixed, weights), expected) and torch.equal(table, arguments["table"])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_in_the_query_stays_in_its_row(device):
    arguments = problem(device, torch.float32, B=2)
    expected = resona_step(**arguments)
    arguments["x"][0] = torch.nan
    assert torch.equal(resona_step(**arguments)[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 5}, "at most 4 rows, got 5"), ({"top_k": 17}, "at most 16 chunks a query, got 17"),
     ({"chunk_size": 257}, "at most 256 tokens a chunk"), ({"num_heads": 128}, "at most 64 heads"),
     ({"num_heads": 40, "chunk_size": 130}, "at most 8192 heads times tokens"),
     ({"encoder_dim": 9000}, "at most 8192 numbers"), ({"hidden_size": 9000}, "at most 8192 channels")],
)  # fmt: skip
def test_what_is_too_much_is_named(change, message):
    sizes = {"rows": 1, "hidden_size": 64, "encoder_dim": 64, "top_k": 1, "num_heads": 1, "chunk_size": 4}
    assert fits(**sizes) == ""
    assert message in fits(**{**sizes, **change})


def test_too_many_rows_are_refused(device):
    with pytest.raises(ValueError, match="resona_step takes at most 4 rows, got 5"):
        resona_step(**problem(device, torch.float32, B=5))


@pytest.mark.parametrize("resona", ["default", "linear", "no gate"])
def test_a_model_decodes_through_it(device, resona, monkeypatch):
    model = make_model("gla", resona).to(device)
    known, steps = plain_loop(model, device), []
    fused = lambda *arguments: steps.append(arguments) or own.resona_step(*arguments)  # noqa: E731
    monkeypatch.setattr(resona_layer, "fusion", lambda name, x: fused)
    assert_steps_agree(model, *known)
    assert len(steps) == 8 * len(model.config.resona_layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda model: model.double(), "got torch.float64"), (lambda model: model.model.embeddings.double(), "float"),
     (lambda model: setattr(model.model.layers[0].mixer, "o_proj", torch.nn.Sequential(torch.nn.Linear(16, 16))),
      "plain")],
)  # fmt: skip
def test_what_the_adapter_cannot_take(device, change, message):
    model = make_model("gla", "default").to(device)
    change(model)
    layer = model.model.layers[0].mixer
    x = torch.zeros(1, 1, 16, dtype=layer.q_proj.weight.dtype, device=device)
    memory = TokenMemory(torch.zeros(1, 8, dtype=torch.int64, device=device), model.model.embeddings)
    with pytest.raises(Unsupported, match=message):
        own.resona_step(x, x, layer, x.expand(1, 4, 16), memory, torch.zeros((), dtype=torch.int64, device=device))


def test_adapters_say_what_the_kernels_of_long_inputs_cannot_take(device):
    x, none = torch.zeros(1, 2, 8, device=device), torch.zeros(1, 2, dtype=torch.int64, device=device)
    with pytest.raises(Unsupported, match="at most 16 chunks a query, got 17"):
        own.chunk_search(x, x, none, 17)
    with pytest.raises(Unsupported, match="got torch.float64"):
        own.chunk_search(x.double(), x.double(), none, 1)
    for d, U, k, message in [(257, 1, 1, "256 channels a head"), (8, 257, 1, "256 tokens a chunk"), (8, 1, 17, "16 c")]:
        keys = torch.zeros(1, 1, U, 1, d, device=device)
        with pytest.raises(Unsupported, match=message):
            own.chunk_attention(keys[:, :, 0], keys, keys, none[..., None].expand(1, 2, k), None)


def test_adapters_hand_over_what_the_torch_forms_take(device):
    generator = torch.Generator().manual_seed(0)
    queries, chunks, keys = (torch.randn(shape, generator=generator).to(device)
                             for shape in ((2, 9, 8), (2, 4, 8), (2, 4, 3, 2, 16)))  # fmt: skip
    visible = search.visible_chunks(torch.arange(9, device=device)[None], 2)
    indices, scores = own.chunk_search(queries, chunks, visible, 3)
    expected_indices, expected_scores = search.chunk_search_torch(queries, chunks, visible, 3)
    assert torch.equal(indices, expected_indices)
    assert_close(scores, expected_scores)
    q = torch.randn((2, 9, 2, 16), generator=generator).to(device)
    for weights in (None, scores.softmax(-1)):
        actual = own.chunk_attention(q, keys, keys.flip(1), indices, weights)
        assert_close(actual, integrate.chunk_attention_torch(q, keys, keys.flip(1), indices, weights))
