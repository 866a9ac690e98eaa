"""The contract is written twice: what lora_kernels/ops.py refuses csrc/contract.h leaves to it, and takes everything else."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import CPU, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.autograd import linears
from lora_kernels.backends import native
from lora_kernels.layer import Layer

pytestmark = pytest.mark.skipif(native.unavailable(CPU) is not None, reason="the C++ extension is not built")

W = torch.randn(6, 64)
X, A, B, BIAS, SEED = torch.randn(3, 64), torch.randn(2, 64), torch.randn(6, 2), torch.randn(6), torch.tensor([7])
GOOD = Layer.of(lk.quantize(W), A, B, 2.0, BIAS)
SINGLE = Layer.of(lk.quantize(W, double_quant=False), A, B, 2.0, BIAS)


def by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "qlora_linear_autograd", lambda x, layers: None)


# ---- bad input

BAD_X = {
    "float64": X.double(),
    "integers": X.long(),
    "K": X[:, 1:],
    "a scalar": torch.tensor(1.0),
    "on another device": X.to("meta"),
    "a list": [1.0],
    "None": None,
}
BAD = {
    "shape of 3 numbers": {"shape": (2, 3, 64)},
    "shape of 1 number": {"shape": (384,)},
    "shape of other K": {"shape": (6, 63)},
    "shape of no rows": {"shape": (0, 64)},
    "shape whose product wraps round": {"shape": (2**58, 64), "packed": GOOD.packed[:0], "absmax": GOOD.absmax[:0]},
    "shape of text": {"shape": ("6", "64")},
    "unknown quant_type": {"quant_type": "nf8"},
    "quant_type with a zero byte": {"quant_type": "nf4\0x"},
    "quant_type None": {"quant_type": None},
    "quant_type 4": {"quant_type": 4},
    "blocksize 48": {"blocksize": 48},
    "blocksize 16": {"blocksize": 16},
    "blocksize 0": {"blocksize": 0},
    "blocksize -64": {"blocksize": -64},
    "blocksize 8192": {"blocksize": 8192},
    "blocksize 2**70": {"blocksize": 2**70},
    "blocksize of another weight": {"blocksize": 128},
    "blocksize 64.0": {"blocksize": 64.0},
    "blocksize True": {"blocksize": True},
    "blocksize as text": {"blocksize": "64"},
    "packed too short": {"packed": GOOD.packed[1:]},
    "packed elsewhere": {"packed": GOOD.packed.to("meta")},
    "packed None": {"packed": None},
    "absmax too short": {"absmax": GOOD.absmax[1:]},
    "absmax of floats": {"absmax": SINGLE.absmax},
    "absmax elsewhere": {"absmax": GOOD.absmax.to("meta")},
    "absmax2 too long": {"absmax2": torch.rand(2)},
    "absmax2 of half": {"absmax2": GOOD.absmax2.half()},
    "code2 too short": {"code2": torch.rand(255)},
    "code2 None": {"code2": None},
    "offset of half": {"offset": GOOD.offset.half()},
    "offset None": {"offset": None},
    "lora_A alone": {"lora_B": None},
    "lora_B alone": {"lora_A": None},
    "lora_A of other K": {"lora_A": A[:, 1:]},
    "lora_A transposed": {"lora_A": A.T},
    "lora_A 1-D": {"lora_A": A[0]},
    "lora_A 3-D": {"lora_A": A[None]},
    "lora_A of rank 0": {"lora_A": A[:0], "lora_B": B[:, :0]},
    "lora_A of integers": {"lora_A": A.int()},
    "lora_A elsewhere": {"lora_A": A.to("meta")},
    "lora_A an int": {"lora_A": 3},
    "lora_A a list": {"lora_A": [1.0]},
    "lora_B of another rank": {"lora_B": torch.randn(6, 3)},
    "lora_B of other N": {"lora_B": B[1:]},
    "lora_B of float64": {"lora_B": B.double()},
    "lora_B text": {"lora_B": "B"},
    "bias of other N": {"bias": BIAS[1:]},
    "bias 2-D": {"bias": BIAS[None]},
    "bias of integers": {"bias": BIAS.int()},
    "bias elsewhere": {"bias": BIAS.to("meta")},
    "bias a str": {"bias": "bias"},
    "bias a number": {"bias": 1.0},
    "scaling NaN": {"scaling": math.nan},
    "scaling infinite": {"scaling": -math.inf},
    "scaling None": {"scaling": None},
    "scaling text": {"scaling": "two"},
    "dropout_p 1": {"dropout_p": 1.0},
    "dropout_p -0.1": {"dropout_p": -0.1},
    "dropout_p NaN": {"dropout_p": math.nan},
    "dropout_p text": {"dropout_p": "some"},
    "dropout_p without an adapter": {"lora_A": None, "lora_B": None, "dropout_p": 0.5},
    "seed of floats": {"dropout_p": 0.5, "seed": torch.tensor([1.0])},
    "seed of two": {"dropout_p": 0.5, "seed": torch.tensor([1, 2])},
    "seed elsewhere": {"dropout_p": 0.5, "seed": SEED.to("meta")},
}


def refusal(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    assert "incompatible function arguments" not in str(caught.value)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_bad_layer_is_refused_alike(changes: dict[str, Any], grad: bool, monkeypatch):
    layers = [GOOD, GOOD._replace(**changes)]
    with torch.set_grad_enabled(grad):
        for some in (layers, layers[1:]):
            assert native.qlora_linear_autograd(X, some) is None
            said = refusal(lambda some=some: linears(X, some))
            with monkeypatch.context() as patch:
                by_python(patch)
                assert refusal(lambda some=some: linears(X, some)) == said


@pytest.mark.parametrize("field", ["code2", "offset"])
def test_parts_that_single_quantization_lacks(field: str, monkeypatch):
    some = [SINGLE._replace(**{field: torch.empty(256, device="meta")})]
    assert native.qlora_linear_autograd(X, some) is None
    said = refusal(lambda: linears(X, some))
    by_python(monkeypatch)
    assert refusal(lambda: linears(X, some)) == said


@pytest.mark.parametrize("x", BAD_X.values(), ids=BAD_X)
def test_bad_x_is_refused_alike(x: Any, monkeypatch):
    if isinstance(x, torch.Tensor):
        assert native.qlora_linear_autograd(x, [GOOD]) is None
    said = refusal(lambda: linears(x, [GOOD]))
    by_python(monkeypatch)
    assert refusal(lambda: linears(x, [GOOD])) == said


def test_no_layers():
    assert native.qlora_linear_autograd(X, []) is None


@pytest.mark.parametrize("size", [0, 7, 13, 15])
def test_wrong_number_of_fields(size: int):
    for op in (native.qlora_linear, native.qlora_linear_autograd):
        with pytest.raises(TypeError, match=rf"a layer must be a tuple of 14 items \(packed, .*, seed\), got {size}"):
            op(X, [(*GOOD, None)[:size]])
    if size != 13:  # what follows the weight has defaults in Python
        with pytest.raises(TypeError, match="argument"):
            Layer(*(*GOOD, None)[:size])


def test_a_layer_is_a_tuple():
    for op in (native.qlora_linear, native.qlora_linear_autograd):
        with pytest.raises(TypeError, match=r"a layer must be a tuple of 14 items .*, got list"):
            op(X, [list(GOOD)])
        with pytest.raises(TypeError, match="layers must be a sequence"):
            op(X, None)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("lora_A", 3, "a torch.Tensor or None, got int"),
        ("packed", None, "a torch.Tensor, got NoneType"),
        ("bias", "b", "a torch.Tensor or None, got str"),
        ("shape", [6, 64], "a tuple of two integers, got list"),
        ("blocksize", 64.0, "an integer, got float"),
        ("scaling", None, "a number, got NoneType"),
        ("quant_type", 4, "a string, got int"),
        ("quant_type", "nf8", "one of nf4, fp4.*, got 'nf8'"),
    ],
)
def test_ops_below_the_contract_name_the_field(field: str, value: Any, wanted: str):
    bad = GOOD._replace(**{field: value})
    with pytest.raises(ValueError, match=f"^{field} must be {wanted}"):
        native.qlora_linear(X, [bad])
    with pytest.raises(ValueError, match=f"^{field} must be {wanted}"):
        native.qlora_linear_backward([torch.randn(3, 6)], X, [None], [bad], True, [(False, False, False)])


# ---- good input


def layer(
    quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True, storage=torch.uint8, **changes: Any
) -> Layer:
    return Layer.of(lk.quantize(W, quant_type, blocksize, double_quant, storage), A, B, 2.0, BIAS)._replace(**changes)


TAKEN = {
    "everything": (X, [GOOD]),
    "single quantization": (X, [SINGLE]),
    "no adapter": (X, [layer(lora_A=None, lora_B=None)]),
    "no bias": (X, [layer(bias=None)]),
    "fp4": (X, [layer("fp4")]),
    "blocks of 32": (X, [layer(blocksize=32)]),
    "blocks of 4096": (X, [layer(blocksize=4096)]),
    "stored as bfloat16": (X, [layer(storage=torch.bfloat16)]),
    "bfloat16": (X.bfloat16(), [GOOD]),
    "float16": (X.half(), [GOOD]),
    "adapter of bfloat16": (X, [layer(lora_A=A.bfloat16(), lora_B=B.bfloat16(), bias=BIAS.half())]),
    "1-D x": (X[0], [GOOD]),
    "4-D x": (torch.randn(2, 1, 3, 64), [GOOD]),
    "no rows": (X[:0], [GOOD]),
    "strided": (torch.randn(64, 3).T, [layer(lora_A=torch.randn(64, 2).T, bias=torch.randn(6, 2)[:, 0])]),
    "dropout": (X, [layer(dropout_p=0.5, seed=SEED)]),
    "integers for numbers": (X, [layer(scaling=2, dropout_p=0)]),
    "a seed that nobody needs": (X, [layer(seed=SEED)]),
    "trained": (X.clone().requires_grad_(), [layer(lora_A=A.clone().requires_grad_(), bias=torch.nn.Parameter(BIAS))]),
    "several": (X, [GOOD, SINGLE, layer("fp4", lora_A=None, lora_B=None), layer(dropout_p=0.1, seed=SEED)]),
    "a plain tuple": (X, [tuple(GOOD)]),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("x", "layers"), TAKEN.values(), ids=TAKEN)
def test_good_input_is_taken(x: torch.Tensor, layers: list[Layer], autocast: bool, monkeypatch):
    def run() -> list[torch.Tensor]:
        trained = [t for t in (x, *(t for one in layers for t in one)) if isinstance(t, torch.Tensor) and t.requires_grad]
        with torch.autocast("cpu", enabled=autocast):
            ys = linears(x, [Layer(*one) for one in layers])
        return [*ys, *(torch.autograd.grad(sum(y.float().square().sum() for y in ys), trained) if trained else ())]

    with torch.autocast("cpu", enabled=autocast):
        assert native.qlora_linear_autograd(x, layers) is not None
    taken = run()
    by_python(monkeypatch)
    for got, want in zip(taken, run(), strict=True):
        assert_same_bits(got, want)


def test_missing_seed_is_drawn():
    assert native.qlora_linear_autograd(X, [layer(dropout_p=0.5)]) is not None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_watched_calls_are_not_taken():
    def taken(x: torch.Tensor, one: Layer = GOOD) -> bool:
        return native.qlora_linear_autograd(x, [one]) is not None

    assert taken(X)
    with Watching():
        assert not taken(X)
    with FakeTensorMode() as mode:
        assert not taken(mode.from_tensor(X))
    assert not taken(TwoTensor(X, X))
    assert not taken(X, GOOD._replace(lora_A=TwoTensor(A, A)))
    with forward_ad.dual_level():
        assert not taken(forward_ad.make_dual(X, X))
        assert not taken(X, GOOD._replace(bias=forward_ad.make_dual(BIAS, BIAS)))

    seen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(taken(x) or taken(X))
        return x.sum()

    torch.func.grad(watched)(X)
    torch.func.vmap(watched)(X[None])
    assert seen == [False, False]
    assert taken(X)


# ---- the two texts


def test_checks_name_their_twins():
    file = Path(__file__).parents[2] / "csrc/contract.h"
    if not file.is_file():
        pytest.skip("needs the source tree")
    twins = re.findall(r"^// ops\.(\w+).*\ninline bool (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(twins) >= 5
    for in_python, in_cpp in twins:
        assert callable(getattr(ops, in_python)), in_python
        assert in_python.lstrip("_") == in_cpp
