"""`qlora_linear` and its gradients against float64, on every backend."""

from dataclasses import replace
from operator import itemgetter

import pytest
import torch
from helpers import assert_same_bits, run_ops
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels import autograd, ops
from lora_kernels.backends import reference
from lora_kernels.testing import Case, assert_close_to_oracle, make_inputs, philox_words, relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES = [
    # shapes: aligned, ragged, one row, no row, one of everything, blocks that straddle rows
    Case(64, 128, 128, dtype=BF16),
    Case(64, 128, 128, dtype=FP16),
    Case(64, 128, 128, dtype=FP32),
    Case(17, 33, 100, r=3, dtype=BF16, bias=True),
    Case(17, 33, 100, r=3, dtype=FP16, bias=True),
    Case(17, 33, 100, r=3, dtype=FP32, bias=True),
    Case(1, 96, 576, r=16, dtype=BF16),
    Case(1, 95, 576, r=16, dtype=FP32),
    Case(2, 95, 576, r=40, dtype=FP16, bias=True),
    Case(2, 191, 576, r=1, dtype=BF16),
    Case(129, 65, 576, r=16, dtype=BF16, bias=True),
    Case(129, 192, 576, r=16, dtype=FP32, bias=True),
    Case(0, 33, 100, r=8, dtype=BF16, bias=True),
    Case(0, 64, 64, r=0, dtype=FP32),
    Case(1, 1, 1, r=1, dtype=FP32, bias=True),
    Case(5, 1, 100, r=8, dtype=BF16, bias=True),
    Case(17, 7, 1, r=1, dtype=BF16),
    Case(17, 64, 7, r=16, dtype=FP32),
    Case(129, 33, 7, r=8, dtype=FP16),
    Case(31, 257, 320, r=24, dtype=BF16, blocksize=128),
    # adapters: none, wide, in 16 bits
    Case(17, 33, 100, r=0, dtype=BF16, bias=True),
    Case(130, 130, 130, r=0, dtype=FP32),
    Case(1, 576, 192, r=0, dtype=FP16),
    Case(33, 72, 96, r=40, dtype=BF16, lora_dtype=BF16, bias=True),
    Case(33, 72, 96, r=40, dtype=FP32, lora_dtype=BF16),
    Case(33, 72, 96, r=8, dtype=FP16, lora_dtype=FP16, bias=True),
    Case(16, 48, 64, r=96, dtype=BF16),
    Case(16, 48, 64, r=8, dtype=BF16, scaling=-0.25),
    # formats
    Case(40, 66, 130, dtype=BF16, quant_type="fp4"),
    Case(40, 65, 130, dtype=FP32, quant_type="fp4", double_quant=False, bias=True),
    Case(40, 65, 130, dtype=FP16, blocksize=32, double_quant=False),
    Case(40, 65, 131, dtype=BF16, blocksize=4096),
    Case(9, 65, 1024, dtype=BF16, blocksize=512, double_quant=False),
    # magnitudes
    Case(33, 65, 192, dtype=BF16, w_scale=1e-7),
    Case(33, 65, 192, dtype=BF16, w_scale=3e4),
    Case(33, 65, 192, dtype=FP32, x_scale=1e4, w_scale=3e4),
    Case(33, 65, 192, dtype=FP32, x_scale=1e-6, w_scale=1e-7),
    Case(33, 65, 192, dtype=FP16, x_scale=20, w_scale=0.2),
    Case(33, 65, 192, dtype=FP16, x_scale=1e-3, w_scale=1e-3),
    # dropout
    Case(17, 33, 100, dtype=FP32, dropout=0.3, bias=True),
    Case(64, 64, 128, dtype=BF16, dropout=0.05),
    Case(3, 70, 7, r=3, dtype=FP16, dropout=0.5),
    Case(129, 33, 65, dtype=BF16, dropout=0.9, lora_dtype=BF16),
    Case(1, 64, 64, dtype=FP32, dropout=0.1),
    Case(0, 64, 64, dtype=FP32, dropout=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_forward_and_gradients(backend, case, seed):
    inputs = make_inputs(case, seed)
    got = run_ops(inputs)
    assert got["y"].dtype == case.dtype
    for name, like in (("dx", inputs.x), ("dA", inputs.lora_A), ("dB", inputs.lora_B)):
        assert name not in got or got[name].dtype == like.dtype
    assert_close_to_oracle(got, inputs)


def test_random_shapes(backend, seed):
    """Thirty more layers of sizes that nobody chose."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(30):
        r = pick(0, 1, 4, 8, 16, 17, 64)
        case = Case(
            integer(0, 150),
            integer(1, 200),
            integer(1, 400),
            r,
            pick(FP32, FP16, BF16),
            pick("nf4", "fp4"),
            pick(32, 64, 128, 1024),
            pick(True, False),
            pick(True, False),
            pick(0.0, 0.2) if r else 0.0,
            pick(FP32, FP16, BF16),
        )
        inputs = make_inputs(case, integer(0, 2**31))
        assert_close_to_oracle(run_ops(inputs), inputs)


@pytest.mark.parametrize(
    "case", [Case(17, 33, 100, bias=True), Case(17, 33, 100, dtype=FP32, bias=True, dropout=0.4)], ids=lambda c: c.id
)
def test_every_combination_of_gradients(backend, case, seed):
    """Each subset asked for is the same bits as all at once, and nothing else comes back."""
    inputs = make_inputs(case, seed)
    full = run_ops(inputs)
    for i in range(16):
        needs = tuple(bool(i >> k & 1) for k in range(4))
        part = run_ops(inputs, needs)
        assert [n for n in ("dx", "dA", "dB", "dbias") if n in part] == [
            n for n, need in zip(("dx", "dA", "dB", "dbias"), needs, strict=True) if need
        ]
        for name, tensor in part.items():
            assert_same_bits(tensor, full[name], f"{name} with needs {needs}")


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 257, 576, r=16, bias=True, dropout=0.1),
        Case(3, 700, 576, r=16, dtype=FP32),
        Case(65, 330, 200, dtype=FP16),
    ],
    ids=lambda c: c.id,
)
def test_bits_do_not_depend_on_the_run_or_the_threads(backend, case, seed, one_thread):
    """tests/backends/test_native.py has many more layers, on every instruction set."""
    inputs = make_inputs(case, seed)
    first = run_ops(inputs)
    for name, tensor in run_ops(inputs).items():
        assert_same_bits(tensor, first[name], name)
    if backend == "reference":
        return  # plain torch's products depend on the number of threads
    torch.set_num_threads(2)
    for name, tensor in run_ops(inputs).items():
        assert_same_bits(tensor, first[name], f"{name} with two threads")


def test_wrong_gradients_are_seen(seed):
    """The measure of these tests: an error of a few per cent in one element, or of little more than rounding in all, fails."""
    inputs = make_inputs(Case(64, 128, 128, bias=True), seed)
    with lk.use_backend("reference"):
        good = run_ops(inputs)
    for name, tensor in good.items():
        one, all_ = tensor.clone(), tensor * 1.02
        one.view(-1)[-1] += 0.2 * tensor.abs().max()
        for bad in (one, all_, torch.full_like(tensor, float("nan")), tensor[:-1]):
            with pytest.raises(AssertionError, match=name):
                assert_close_to_oracle({name: bad}, inputs)


# ---- the public function


def leaves(inputs, requires_grad=True):
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    return [None if t is None else t.detach().clone().requires_grad_(requires_grad) for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autograd_is_the_two_ops(backend, dropout, seed):
    inputs = make_inputs(Case(17, 33, 100, bias=True, dropout=dropout), seed)
    x, A, B, bias = leaves(inputs)
    torch.manual_seed(seed)
    y = lk.qlora_linear(x, inputs.qw, A, B, 2.0, bias, dropout)
    y.backward(inputs.dy)
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64) if dropout else None
    want = run_ops(replace(inputs, seed=drawn))
    assert_same_bits(y.detach(), want["y"])
    for name, grad in (("dx", x.grad), ("dA", A.grad), ("dB", B.grad)):
        assert_same_bits(grad, want[name], name)
    assert bias.grad.dtype == bias.dtype
    assert_same_bits(bias.grad, want["dbias"].to(bias.dtype))


def test_leading_dimensions_and_strides(backend):
    qw = lk.quantize(torch.randn(20, 48))
    A, B = torch.randn(4, 48), torch.randn(20, 4)
    x = torch.randn(2, 3, 5, 48)
    want = lk.qlora_linear(x.reshape(30, 48), qw, A, B)
    assert_same_bits(lk.qlora_linear(x, qw, A, B), want.view(2, 3, 5, 20))
    assert_same_bits(lk.qlora_linear(x[0], qw, A, B), want[:15].view(3, 5, 20))
    for shape in ((0, 48), (2, 0, 48), (0, 3, 48)):
        empty = torch.randn(shape, requires_grad=True)
        y = lk.qlora_linear(empty, qw, A.requires_grad_(), B)
        assert y.shape == (*shape[:-1], 20)
        y.sum().backward()
        assert empty.grad.shape == shape
        assert A.grad.abs().sum() == 0
    one = lk.qlora_linear(x[0, 0, 0], qw, A, B)
    assert one.shape == (20,)
    assert relative_error(one, want[0]) < 1e-5

    for strided in (x.transpose(0, 2), x.flip(0), x[..., ::2].repeat(1, 1, 1, 2), x[:, :1].expand(2, 4, 5, 48)):
        leaf, dense = strided.detach().requires_grad_(), strided.contiguous().detach().requires_grad_()
        got, expected = lk.qlora_linear(leaf, qw, A, B), lk.qlora_linear(dense, qw, A, B)
        assert_same_bits(got.detach(), expected.detach())
        got.transpose(0, -1).sum(0).sum().backward()
        expected.sum().backward()
        assert_same_bits(leaf.grad, dense.grad)


def test_strided_output_gradient_and_adapters(backend, seed):
    inputs = make_inputs(Case(12, 20, 48, dtype=FP32, bias=True), seed)
    want = run_ops(inputs)
    turned = replace(
        inputs,
        dy=inputs.dy.t().contiguous().t(),
        lora_A=inputs.lora_A.t().contiguous().t(),
        lora_B=inputs.lora_B.t().contiguous().t(),
        bias=torch.stack([inputs.bias, inputs.bias], 1)[:, 0],
    )
    for name, tensor in run_ops(turned).items():
        assert_same_bits(tensor.contiguous(), want[name], name)
    x, A, B, bias = leaves(inputs)
    lk.qlora_linear(x, inputs.qw, A, B, 2.0, bias).sum().backward()  # an expanded gradient of stride 0
    ones = run_ops(replace(inputs, dy=torch.ones_like(inputs.dy)))
    for name, leaf in (("dx", x), ("dA", A), ("dB", B)):
        assert_same_bits(leaf.grad, ones[name], name)


@pytest.mark.parametrize("trained", ["x", "A", "B", "bias", "xA", "xB", "AB", "xABbias", "none"])
def test_only_what_is_asked_for(backend, trained, monkeypatch, seed):
    """The backward op is asked for the gradients that train; x is kept only for lora_A's, h only for lora_B's."""
    inputs = make_inputs(Case(17, 33, 100, r=5, bias=True), seed)
    x, A, B, bias = leaves(inputs, requires_grad=False)
    wanted = [name in trained for name in ("x", "A", "B", "bias")]
    for tensor, wants in zip((x, A, B, bias), wanted, strict=True):
        tensor.requires_grad_(wants)
    asked, saved = [], []
    real = autograd._ops.qlora_linear_backward

    class Spy:
        def __getattr__(self, name):
            return getattr(torch.ops.lora_kernels, name)

        def qlora_linear_backward(self, *args):
            asked.append((list(args[-1]), args[1], args[2]))
            return real(*args)

    monkeypatch.setattr(autograd, "_ops", Spy())
    weight = {t.data_ptr() for t in (inputs.qw.packed, inputs.qw.absmax, inputs.qw.absmax2, inputs.qw.code2, inputs.qw.offset)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lk.qlora_linear(x, inputs.qw, A, B, 2.0, bias)
    own = [t for t in saved if t.data_ptr() not in weight | {A.data_ptr(), B.data_ptr()}]
    if trained == "none":
        assert not y.requires_grad
        assert not saved
        return
    assert sum(t.data_ptr() == x.data_ptr() for t in own) == wanted[1], "x is saved once, and only for lora_A"
    assert sum(tuple(t.shape) == (17, 5) for t in own) == wanted[2], "h is saved once, and only for lora_B"
    assert len(own) == wanted[1] + wanted[2]
    y.backward(inputs.dy)
    if backend != "native":  # which asks its own kernels
        ((needs, given_x, given_h),) = asked
        assert needs == wanted
        assert (given_x is not None, given_h is not None) == (wanted[1], wanted[2])
    assert [t.grad is not None for t in (x, A, B, bias)] == wanted
    for leaf, grad in zip((x, A, B, bias), itemgetter("dx", "dA", "dB", "dbias")(run_ops(inputs)), strict=True):
        if leaf.grad is not None:
            assert_same_bits(leaf.grad, grad.to(leaf.dtype))


def test_no_grad_saves_nothing(seed):
    inputs = make_inputs(Case(17, 33, 100), seed)
    x, A, B, _ = leaves(inputs)
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lk.qlora_linear(x, inputs.qw, A, B)
    assert not saved
    assert not y.requires_grad
    with torch.inference_mode():
        assert_same_bits(lk.qlora_linear(x, inputs.qw, A, B), y)


def test_autocast(backend, seed):
    inputs = make_inputs(Case(17, 33, 100, dtype=FP32, bias=True), seed)
    x, A, B, bias = leaves(inputs)
    with torch.autocast("cpu", BF16):
        y = lk.qlora_linear(x, inputs.qw, A, B, 2.0, bias)
    assert y.dtype == BF16
    want = run_ops(replace(inputs, x=inputs.x.to(BF16), dy=inputs.dy.to(BF16)))
    assert_same_bits(y.detach(), want["y"])
    y.backward(inputs.dy.to(BF16))
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype, bias.grad.dtype) == (FP32,) * 4
    assert_same_bits(x.grad, want["dx"].float())
    assert_same_bits(A.grad, want["dA"])


def test_twice_backward_is_refused(backend):
    x = torch.randn(3, 64, requires_grad=True)
    qw = lk.quantize(torch.randn(5, 64))
    (dx,) = torch.autograd.grad(lk.qlora_linear(x, qw).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gradcheck(dropout, quant_type, monkeypatch):
    """The formulas of the gradient themselves, in float64 by finite differences; one dropout seed for all evaluations."""
    qw = lk.quantize(torch.randn(5, 7), quant_type, 32)
    x, A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (2, 7), (5, 2)))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        torch.manual_seed(1)
        x, A, B, bias = tensors
        return lk.qlora_linear(x, qw, A, B, 1.5, bias, dropout)

    with lk.use_backend("reference"):
        assert torch.autograd.gradcheck(run, (x, A, B, bias))
        plain = torch.autograd.gradcheck(lambda x, b: lk.qlora_linear(x, qw, bias=b), (x, bias))
    assert plain


def test_watched_calls_go_through_the_ops(backend, seed):
    """A dispatch mode sees the ops, forward and backward, and what it sees has the bits of a call that nothing watches."""
    inputs = make_inputs(Case(17, 33, 100, bias=True), seed)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    def gradients():
        x, A, B, bias = leaves(inputs)
        lk.qlora_linear(x, inputs.qw, A, B, 2.0, bias).backward(inputs.dy)
        return x.grad, A.grad, B.grad, bias.grad

    seen: list = []
    with Watch():
        watched = gradients()
    ops = torch.ops.lora_kernels
    assert [f for f in seen if f.namespace == "lora_kernels"] == [ops.qlora_linear.default, ops.qlora_linear_backward.default]
    for got, want in zip(watched, gradients(), strict=True):
        assert_same_bits(got, want)


def test_transforms_are_refused(backend):
    """torch.func, and on the native backend a batch of output gradients, end in an error and not in a crash."""
    qw, x = lk.quantize(torch.randn(5, 64)), torch.randn(3, 64)
    with pytest.raises(RuntimeError, match=r"functorch|torch\.func"):
        torch.func.grad(lambda x: lk.qlora_linear(x, qw).sum())(x)
    with pytest.raises(RuntimeError, match=r"functorch|torch\.func"):
        torch.func.vmap(lambda x: lk.qlora_linear(x, qw))(x)
    y = lk.qlora_linear(x.requires_grad_(), qw)
    if backend == "native":
        with pytest.raises(RuntimeError, match="plain CPU tensor"):
            torch.autograd.grad(y, x, torch.randn(2, *y.shape), is_grads_batched=True)


def test_backward_as_often_as_the_graph_is_kept(backend):
    x = torch.randn(3, 64, requires_grad=True)
    y = lk.qlora_linear(x, lk.quantize(torch.randn(5, 64)))
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=keep)[0] for keep in (True, False))
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_parameters_changed_before_backward_are_refused(backend):
    A, B = torch.randn(2, 64, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    y = lk.qlora_linear(torch.randn(3, 64), lk.quantize(torch.randn(5, 64)), A, B)
    with torch.no_grad():
        B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_exceptions_of_saved_tensor_hooks_come_through(backend):
    """Gradient checkpointing ends its second forward by one."""

    def pack(t):
        raise LookupError("from the hook")

    A, B = torch.randn(2, 64, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    qw = lk.quantize(torch.randn(5, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(LookupError, match="from the hook"):
        lk.qlora_linear(torch.randn(3, 64), qw, A, B)


def test_output_can_be_added_to_in_place(backend):
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = lk.qlora_linear(x, lk.quantize(torch.randn(5, 64)))
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_linear_in_scaling(backend, seed):
    """With scaling 0 there is no adapter; the adapter's part grows with it."""
    inputs = make_inputs(Case(17, 33, 100, dtype=FP32), seed)
    args = (inputs.x, inputs.qw, inputs.lora_A, inputs.lora_B)
    base = lk.qlora_linear(inputs.x, inputs.qw)
    assert relative_error(lk.qlora_linear(*args, 0.0), base) < 1e-6
    once, twice = (lk.qlora_linear(*args, s) - base for s in (1.0, 2.0))
    assert relative_error(twice, 2 * once) < 1e-4


# ---- dropout

KNOWN = [  # the known-answer vectors of philox4x32-10 in the Random123 library: counter, key, words
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter, key):
    """Philox 4x32-10 in Python's integers, straight from the paper."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


def test_philox_known_answers():
    for counter, key, words in KNOWN:
        assert philox(counter, key) == words
    assert philox_words(0, 4).tolist() == KNOWN[0][2]


def mask_of(backend, seed, shape, p):
    """The factors of a dropout mask through the ops: h of an identity adapter for an input of ones."""
    _, K = shape
    qw = lk.quantize(torch.zeros(1, K), double_quant=False)
    seed = torch.tensor([seed])
    x = torch.ones(shape)
    _, h = torch.ops.lora_kernels.qlora_linear(x, *qw.op_args(), torch.eye(K), torch.zeros(1, K), 1.0, None, p, seed)
    return h


@pytest.mark.parametrize("seed_value", [0, 1, 2**32, 0x299F31D0A4093822, 2**63 - 1, -1])
def test_mask_is_philox(backend, seed_value):
    """Element i is kept if word i % 4 under counter i // 4 is at least p * 2**32; every word is pinned to the bit."""
    words = [w for j in range(9) for w in philox([j, 0, 0, 0], [seed_value & 0xFFFFFFFF, seed_value >> 32 & 0xFFFFFFFF])][:35]
    assert philox_words(seed_value, 35).tolist() == words
    for p in (0.1, 0.5, 0.99):
        want = [float(w >= round(p * 2**32)) for w in words]
        assert (mask_of(backend, seed_value, (5, 7), p) > 0).float().view(-1).tolist() == want
    for i in (0, 1, 2, 3, 17, 34):
        at, above = words[i] / 2**32, (words[i] + 1) / 2**32
        assert mask_of(backend, seed_value, (5, 7), at).view(-1)[i] > 0
        assert mask_of(backend, seed_value, (5, 7), above).view(-1)[i] == 0


def test_mask_statistics(backend, seed):
    for p in (0.05, 0.5, 0.9):
        mask = mask_of(backend, seed, (2000, 65), p)
        kept = (mask > 0).double().mean().item()
        assert abs(kept - (1 - p)) < 6 * (p * (1 - p) / mask.numel()) ** 0.5
        assert_same_bits(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - p)))
        assert (mask_of(backend, seed + 1, (2000, 65), p) > 0).ne(mask > 0).any()
        assert_same_bits(mask_of(backend, seed, (2000, 65), p), mask)


def test_mask_is_the_same_in_backward(backend, seed):
    """With W = 0, dx is non-zero where h saw x, and dA is zero for a dropped column.  Small integers: sums are exact."""
    K, p, torch_seed = 40, 0.5, torch.tensor([seed])
    qw = lk.quantize(torch.zeros(8, K), double_quant=False)
    x, dy, A, B = torch.ones(6, K), torch.ones(6, 8), torch.randint(1, 4, (3, K)).float(), torch.randint(1, 4, (8, 3)).float()
    forward = mask_of(backend, seed, (6, K), p)
    grads = torch.ops.lora_kernels.qlora_linear_backward(
        dy, x, torch.zeros(6, 3), *qw.op_args(), A, B, 1.0, p, torch_seed, [True, True, True, False]
    )
    assert torch.equal(grads[0] != 0, forward != 0)
    assert torch.equal(grads[1], (dy @ B).T @ forward)


def test_reference_mask_far_beyond_32_bits():
    """Elements beyond 2**34 take the high word of the counter: same formula, checked on the words."""
    assert philox([2**32 - 1, 0, 0, 0], [5, 6]) != philox([2**32 - 1, 1, 0, 0], [5, 6])
    got = reference.dropout_scale(torch.tensor([12345]), (3, 5), 0.3)
    words = philox_words(12345, 15).view(3, 5)
    assert torch.equal(got > 0, words >= round(0.3 * 2**32))


def test_masks_of_successive_calls_differ():
    """The seed comes from torch's generator: other calls, other masks; the same generator state, the same mask."""
    qw = lk.quantize(torch.zeros(4, 64), double_quant=False)
    x, A, B = torch.ones(5, 64), torch.rand(8, 64), torch.rand(4, 8)
    first, second = (lk.qlora_linear(x, qw, A, B, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    a = lk.qlora_linear(x, qw, A, B, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(a, lk.qlora_linear(x, qw, A, B, dropout_p=0.5))


# ---- the ops as torch sees them


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 10, 20, r=3, dtype=FP32, bias=True),
        Case(4, 10, 20, r=0, dtype=BF16),
        Case(0, 10, 20, r=3, dtype=FP16),
        Case(4, 10, 20, r=2, dtype=BF16, lora_dtype=BF16, double_quant=False, dropout=0.2),
    ],
    ids=lambda c: c.id,
)
def test_opcheck(backend, case, seed):
    c, i = case, make_inputs(case, seed)
    lora = (i.lora_A, i.lora_B, c.scaling)
    forward = (i.x, *i.qw.op_args(), *lora, i.bias, c.dropout, i.seed)
    torch.library.opcheck(torch.ops.lora_kernels.qlora_linear, forward)
    _, h = torch.ops.lora_kernels.qlora_linear(*forward)
    for needs in ([True, bool(c.r), bool(c.r), c.bias], [False, False, bool(c.r), False], [True, False, False, True]):
        backward = (i.dy, i.x if needs[1] else None, h if needs[2] else None, *i.qw.op_args(), *lora, c.dropout, i.seed, needs)
        torch.library.opcheck(torch.ops.lora_kernels.qlora_linear_backward, backward)


def test_fake_agrees_with_real(backend, seed):
    """Shapes, dtypes and strides of every result, for every case of this file."""
    from torch._subclasses import FakeTensorMode

    for case in CASES:
        inputs = make_inputs(case, seed)
        real = run_ops(inputs)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run_ops(
                replace(
                    inputs,
                    **{
                        n: mode.from_tensor(t)
                        for n in ("x", "dy", "lora_A", "lora_B", "bias", "seed")
                        if (t := getattr(inputs, n)) is not None
                    },
                )
            )
        for name in real:
            assert (fake[name].shape, fake[name].dtype, fake[name].stride()) == (
                real[name].shape,
                real[name].dtype,
                real[name].stride(),
            ), f"{name} {case.id}"


def test_ops_are_registered():
    for name in ("quantize", "decode_absmax", "dequantize", "qlora_linear", "qlora_linear_backward"):
        assert hasattr(ops, f"check_{name}")
        assert hasattr(torch.ops.lora_kernels, name)
