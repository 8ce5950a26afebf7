"""The long convolution on a GPU against its torch form in fp64: errors, equal runs, causality, graphs, whole layers."""

import pytest
import torch
from closeness import assert_close

from lrm_kernels.long_conv import long_conv
from lrm_recall.mixers.find import mixer_class
from lrm_recall.ops.conv import long_conv_torch
from lrm_recall.ops.dispatch import BACKEND_VARIABLE

NAMES = ("y", "grad x", "grad kernel")
TOLERANCE = {"ieee": 5e-6, "tf32": 2e-3, "bf16": 1e-2}
SHAPES = [(128, 512, 512, 128), (64, 64, 64, 64), (3, 300, 65, 70), (1, 2048, 2048, 16), (7, 1, 1, 5), (20, 33, 2, 3)]


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN; the precision of products is put back."""
    before = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before)


def drawn(B, T, L, D, precision="ieee"):
    """x, kernel and the gradient of y."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    torch.manual_seed(B + T + L + D)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return [torch.randn(shape, device="cuda").to(dtype) for shape in ((B, T, D), (L, D), (B, T, D))]


def results(function, x, kernel, weights):
    x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    y = function(x, kernel)
    return [y.detach(), *torch.autograd.grad(y, (x, kernel), weights)]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("B", "T", "L", "D"), SHAPES)
def test_errors_and_equal_runs(B, T, L, D, precision):
    x, kernel, weights = drawn(B, T, L, D, precision)
    actual, again = (results(long_conv, x, kernel, weights) for _ in range(2))
    rows = results(long_conv, x.permute(2, 0, 1).contiguous().permute(1, 2, 0), kernel, weights)
    expected = results(long_conv_torch, x.double(), kernel.double(), weights.double())
    for name, found, wanted in zip(NAMES, actual, expected, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        print(f"B {B} T {T} L {L} D {D} {precision} {name}: relative error {error:.1e}")
        assert_close(found, wanted, TOLERANCE[precision], name)
    for other in (again, rows):
        assert all(torch.equal(a, b) for a, b in zip(actual, other, strict=True))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_exact_causality(precision):
    x, kernel, _ = drawn(4, 300, 300, 32, precision)
    y = long_conv(x, kernel)
    for t in (0, 63, 64, 200, 298):
        other = x.clone()
        other[:, t + 1 :] = 1e6 * torch.randn_like(other[:, t + 1 :])
        assert torch.equal(long_conv(other, kernel)[:, : t + 1], y[:, : t + 1])
        weights = torch.zeros_like(x)
        weights[:, t] = 1
        _, grad_x, grad_kernel = results(long_conv, x, kernel, weights)
        assert grad_x[:, : t + 1].ne(0).all() and grad_x[:, t + 1 :].eq(0).all()
        assert grad_kernel[t + 1 :].eq(0).all()


def test_64_bit_offsets():
    x = torch.zeros(33000, 1024, 64, device="cuda", dtype=torch.bfloat16)  # 2^31 elements and some
    x[-1] = torch.randn(1024, 64, device="cuda")
    kernel = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        y = long_conv(x, kernel)
        assert_close(y[-1:].float(), long_conv_torch(x[-1:].float(), kernel), TOLERANCE["bf16"])
        assert y[:-1].count_nonzero() == 0


def test_a_captured_graph_replays():
    x, kernel, weights = drawn(8, 200, 200, 64, "tf32")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(long_conv, x, kernel, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(long_conv, x, kernel, weights)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, results(long_conv, x, kernel, weights), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [2, 64, 200])
@pytest.mark.parametrize(
    ("name", "options"),
    [("baseconv", {"kernel_size": -1}), ("hyena", {}), ("h3", {"d_state": 64, "head_dim": 2}), ("h3", {"d_state": 16})],
)
def test_layers(name, options, T, dtype, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    mixer = mixer_class(name)(64, **options).cuda()
    mixer.init_weights(0.05)
    x = torch.randn(4, T, 64, device="cuda", requires_grad=True)
    found = {}
    for form in ("auto", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, form)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = mixer(x)
        weights = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        found[form] = [y, *torch.autograd.grad((y.float() * weights).sum(), [x, *mixer.parameters()])]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for i, (actual, expected) in enumerate(zip(*found.values(), strict=True)):
        assert_close(actual.float(), expected.float(), tolerance, f"result {i}", 1e-3)


def test_what_the_kernel_does_not_take_runs_in_torch(monkeypatch):
    from lrm_recall.ops.conv import long_conv as op

    monkeypatch.setenv(BACKEND_VARIABLE, "library")
    x, kernel = torch.randn(1, 3000, 2, device="cuda"), torch.randn(3000, 2, device="cuda")
    assert torch.equal(op(x, kernel), long_conv_torch(x, kernel))  # many tokens: its FFTs
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        op(x[:, :9].double(), kernel)
    assert_close(op(x[:, :9], kernel, outputs=3), long_conv_torch(x[:, :9], kernel, outputs=3))
    assert_close(op(x, kernel, outputs=1), long_conv_torch(x, kernel, outputs=1))
