"""What every result of `chunk_search` must hold to, on a CPU and on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from lrm_kernels.chunk_search import chunk_search, chunk_search_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
NEAR_TIE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}  # of unit embeddings; sums in fp32 differ


def drawn(dtype: torch.dtype, B: int, T: int, N: int, E: int, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Unit queries [B, T, E] and chunks [B, N, E], and how many each query sees [B, T]: some none, some more than N."""
    generator = torch.Generator(device).manual_seed(seed)
    queries, chunks = (F.normalize(torch.randn(B, length, E, generator=generator, device=device), dim=-1).to(dtype)
                       for length in (T, N))
    return [queries, chunks, torch.randint(-1, N + 3, (B, T), generator=generator, device=device)]


def assert_found(found: tuple[Tensor, Tensor], inputs: list[Tensor], top_k: int) -> None:
    """Indices and scores are those of the reference; two chunks may change places only at a near tie."""
    (indices, scores), (expected, best) = found, chunk_search_reference(*inputs, top_k)
    dtype = inputs[0].dtype
    assert indices.dtype == torch.int64 and scores.dtype == torch.float32
    assert indices.shape == scores.shape == (*inputs[0].shape[:2], top_k)
    assert torch.equal(indices == -1, expected == -1) and (indices >= -1).all()
    assert (scores[indices == -1] == 0).all()
    ordered = indices.sort(dim=-1).values
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(), "a chunk was chosen twice"
    assert_close(scores, best, TOLERANCE[dtype], "scores", 1e-3)
    moved = indices != expected
    assert ((scores - best).abs()[moved] <= NEAR_TIE[dtype]).all(), "another chunk was chosen, and not at a near tie"
    assert_close(_scores_of(*inputs[:2], indices), scores, TOLERANCE[dtype], "scores of the indices", 1e-3)


def assert_forward_and_gradients(inputs: list[Tensor], top_k: int, tolerance: float) -> None:
    """The kernel's result, and its gradients beside those of plain torch in fp32 for the same choice."""
    queries, chunks, visible = (x.detach() for x in inputs)
    queries.requires_grad_()
    chunks.requires_grad_()
    indices, scores = chunk_search(queries, chunks, visible, top_k)
    assert_found((indices, scores.detach()), [queries.detach(), chunks.detach(), visible], top_k)
    generator = torch.Generator(scores.device).manual_seed(1)
    weights = torch.randn(scores.shape, generator=generator, device=scores.device)
    actual = torch.autograd.grad(scores, (queries, chunks), weights)
    wide = [x.detach().float().requires_grad_() for x in (queries, chunks)]
    expected = torch.autograd.grad(_scores_of(*wide, indices), wide, weights)
    for name, x, y, z in zip(("queries", "chunks"), (queries, chunks), actual, expected, strict=True):
        assert y.dtype == x.dtype
        assert_close(y.float(), z, tolerance, f"gradient of the {name}", 1e-3)


def _scores_of(queries: Tensor, chunks: Tensor, indices: Tensor) -> Tensor:
    """Scores [B, T, k] of given chunks, 0 where there is none."""
    padded = F.pad(chunks.float(), (0, 0, 1, 0))  # [B, 1 + N, E]: as the chunk -1 may be missing
    batch = torch.arange(len(indices), device=indices.device)[:, None, None]
    scores = torch.einsum("bte,btke->btk", queries.float(), padded[batch, indices + 1])
    return scores.masked_fill(indices == -1, 0.0)
