"""chunk_attention on a GPU: random shapes against plain torch in fp32, outputs poisoned; and 64-bit offsets."""

import random

import pytest
import torch
from closeness import assert_close

from lrm_kernels import chunk_attention_tiles
from lrm_kernels.chunk_attention import chunk_attention, chunk_attention_reference

SHAPES = 20  # of each family; a family shares its compiled kernels
FAMILIES = [  # dtype, H, d, U, k, whether chunks have weights
    (torch.bfloat16, 1, 32, 2, 1, True),  # MQAR
    (torch.bfloat16, 1, 256, 2, 1, True),
    (torch.bfloat16, 1, 64, 6, 1, False),
    (torch.bfloat16, 2, 64, 16, 4, True),
    (torch.bfloat16, 4, 128, 64, 4, True),
    (torch.bfloat16, 2, 128, 64, 2, False),
    (torch.bfloat16, 1, 256, 64, 1, True),
    (torch.bfloat16, 3, 96, 33, 3, False),
    (torch.bfloat16, 2, 128, 256, 2, True),
    (torch.bfloat16, 1, 128, 100, 16, False),
    (torch.float16, 2, 64, 64, 2, True),
    (torch.float32, 2, 33, 2, 1, True),
    (torch.float32, 1, 64, 40, 3, False),
    (torch.float32, 1, 128, 16, 2, True),
    (torch.float32, 1, 256, 20, 2, False),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
MOST = 1 << 25  # elements that the reference gathers
NAMES = ("output", "d queries", "d keys", "d values", "d weights")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def chosen(draw, B, T, N, U, k):
    """Indices [B, T, k] in one of five patterns."""
    indices = torch.randint(-1, N, (B, T, k), device="cuda")
    pattern = draw.choice(["random", "causal", "one", "few", "none"])
    if pattern == "causal":
        seen = (torch.arange(T, device="cuda") // U).clamp(max=N)[None, :, None]  # chunks wholly before each query
        indices = torch.where(seen > 0, indices.clamp(min=0) % seen.clamp(min=1), -1)
    elif pattern == "one":
        indices.fill_(draw.randrange(N))
    elif pattern == "few":
        indices = torch.where(torch.rand(B, T, k, device="cuda") < 0.9, -1, indices)
    elif pattern == "none":
        indices.fill_(-1)
    return indices


@pytest.mark.parametrize("passes", ["all heads", "head by head"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_soak(family, passes, monkeypatch):
    dtype, H, d, U, k, gate = family
    if passes == "head by head":
        if H * k == 1 and U <= 64:
            pytest.skip("nothing is merged")
        monkeypatch.setattr(chunk_attention_tiles, "SCRATCH_BYTES", 1)
    draw = random.Random(f"{family} {passes}")
    torch.manual_seed(draw.randrange(2**31))
    for shape in range(SHAPES if passes == "all heads" else SHAPES // 2):
        B, N = draw.randint(1, 3), draw.choice([1, 2, 7, 40, 300])
        T = draw.choice([1, 15, 64, 129, 500, 2000])
        T = max(1, min(T, MOST // (B * k * U * H * d)))
        q, *kv = (torch.randn(s, device="cuda", dtype=dtype) for s in [(B, T, H, d), *[(B, N, U, H, d)] * 2])
        inputs = [q, *kv, chosen(draw, B, T, N, U, k), torch.rand(B, T, k, device="cuda", dtype=dtype)]
        d_out, results = torch.randn_like(q), {}
        for function, precision in ((chunk_attention, dtype), (chunk_attention_reference, torch.float32)):
            leaves = [x.to(precision).requires_grad_() for x in (inputs[:3] + inputs[4:] if gate else inputs[:3])]
            out = function(*leaves[:3], inputs[3], *leaves[3:])
            results[function] = [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(precision))]
        what = f"shape {shape}: B {B}, T {T}, N {N}"
        few = int((inputs[3] >= 0).sum()) < 64  # then the rounding of one number may be all the error there is
        for name, x, y in zip(NAMES, *results.values(), strict=False):
            assert x.dtype == dtype
            assert_close(x.float(), y, (1 + few) * TOLERANCE[dtype], f"{name} of {what}", 1e-2)


@torch.no_grad()
def test_more_than_2_to_the_31_elements():
    B, T, H, d, N, U, k = 1, 2**20 + 3, 16, 128, 2**14 + 1, 64, 2
    draw = torch.Generator("cuda").manual_seed(0)
    torch.use_deterministic_algorithms(False)  # NaN for 4 GB at a time costs more than the test
    q, keys, values = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=draw)
        for s in [(B, T, H, d), (B, N, U, H, d), (B, N, U, H, d)]
    )
    assert min(x.numel() for x in (q, keys, values)) > 2**31
    indices = torch.randint(N, (B, T, k), device="cuda", generator=draw)
    indices[:, -1] = N - 1
    weights = torch.rand(B, T, k, device="cuda", dtype=torch.bfloat16, generator=draw)
    rows = torch.cat([torch.randint(T, (200,), device="cuda", generator=draw), torch.arange(T - 50, T, device="cuda")])
    for w in (weights, None):
        out = chunk_attention(q, keys, values, indices, w)[:, rows]
        chunks, own = indices[:, rows].unique(return_inverse=True)  # the reference gets those chunks alone
        expected = chunk_attention_reference(
            q[:, rows].float(), keys[:, chunks].float(), values[:, chunks].float(), own,
            None if w is None else w[:, rows].float(),
        )  # fmt: skip
        assert_close(out.float(), expected, 5e-3)
