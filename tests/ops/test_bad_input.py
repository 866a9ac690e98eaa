"""Bad input, in one table: call, exception, and the words that its message must contain."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import AdapterConfig, FusedQLoRALinear, backends

W = torch.randn(6, 64)
QW = lk.quantize(W)
SINGLE = lk.quantize(W, double_quant=False)
EMPTY = replace(SINGLE, packed=SINGLE.packed[:0], absmax=SINGLE.absmax[:0], shape=(6, 0))
X, A, B, BIAS = torch.randn(3, 64), torch.randn(2, 64), torch.randn(6, 2), torch.randn(6)
META = {"device": "meta"}
ops = torch.ops.lora_kernels
LAYER = FusedQLoRALinear(64, 6, r=2)
SEED = torch.tensor([1])


def linear(x=X, qw=QW, lora_A=A, lora_B=B, scaling=1.0, bias=BIAS, dropout_p=0.0):
    return lk.qlora_linear(x, qw, lora_A, lora_B, scaling, bias, dropout_p)


def forward_op(x=X, lora=(A, B, 1.0), bias=None, p=0.0, seed=None):
    return ops.qlora_linear(x, *QW.op_args(), *lora, bias, p, seed)


def backward_op(dy=None, x=X, h=None, lora=(A, B, 1.0), p=0.0, seed=None, needs=(True, True, True, True)):
    dy = torch.randn(3, 6) if dy is None else dy
    return ops.qlora_linear_backward(dy, x, torch.randn(3, 2) if h is None else h, *QW.op_args(), *lora, p, seed, list(needs))


T, V = TypeError, ValueError
TABLE = [
    # quantize
    ("quantize: no tensor", lambda: lk.quantize([1.0]), T, ["weight", "torch.Tensor", "list"]),
    (
        "quantize: integers",
        lambda: lk.quantize(torch.ones(3, dtype=torch.int64)),
        T,
        ["weight", "float32", "bfloat16", "int64"],
    ),
    ("quantize: float64", lambda: lk.quantize(W.double()), T, ["weight", "float32", "float64"]),
    ("quantize: empty", lambda: lk.quantize(torch.ones(0, 4)), V, ["weight", "at least one element", "[0, 4]"]),
    ("quantize: NaN", lambda: lk.quantize(W * math.nan), V, ["weight", "NaN"]),
    ("quantize: quant_type", lambda: lk.quantize(W, "int4"), V, ["quant_type", "nf4, fp4", "'int4'"]),
    ("quantize: quant_type None", lambda: lk.quantize(W, None), V, ["quant_type", "nf4, fp4", "None"]),
    ("quantize: blocksize 48", lambda: lk.quantize(W, blocksize=48), V, ["blocksize", "32, 64", "4096", "48"]),
    ("quantize: blocksize 16", lambda: lk.quantize(W, blocksize=16), V, ["blocksize", "16"]),
    ("quantize: blocksize 8192", lambda: lk.quantize(W, blocksize=8192), V, ["blocksize", "8192"]),
    ("quantize: blocksize 64.0", lambda: lk.quantize(W, blocksize=64.0), V, ["blocksize", "64.0"]),
    ("quantize: blocksize True", lambda: lk.quantize(W, blocksize=True), V, ["blocksize", "True"]),
    ("quantize: storage", lambda: lk.quantize(W, quant_storage=torch.int32), V, ["quant_storage", "uint8", "float32", "int32"]),
    (
        "quantize: storage that does not fit",
        lambda: lk.quantize(torch.randn(3, 3), quant_storage=torch.float32),
        V,
        ["quant_storage", "float32", "4 bytes", "5 packed bytes", "torch.uint8"],
    ),
    # dequantize and decode_absmax
    ("dequantize: a tensor", lambda: lk.dequantize(W), T, ["QuantizedWeight", "Tensor"]),
    ("dequantize: dtype", lambda: lk.dequantize(QW, torch.int8), T, ["dtype", "float32", "int8"]),
    ("dequantize: float64", lambda: lk.dequantize(QW, torch.float64), T, ["dtype", "float64"]),
    ("dequantize: packed", lambda: lk.dequantize(replace(QW, packed=QW.packed[1:])), V, ["packed", "192", "191", "[6, 64]"]),
    ("dequantize: blocksize", lambda: lk.dequantize(replace(QW, blocksize=128)), V, ["absmax", "[3]", "128", "[6]"]),
    (
        "dequantize: scale of another dtype",
        lambda: lk.dequantize(replace(SINGLE, absmax=SINGLE.absmax.half())),
        V,
        ["absmax", "float16"],
    ),
    (
        "dequantize: other device",
        lambda: lk.dequantize(replace(SINGLE, absmax=SINGLE.absmax.to("meta"))),
        V,
        ["absmax", "cpu", "meta"],
    ),
    ("dequantize: quant_type", lambda: lk.dequantize(replace(QW, quant_type="x")), V, ["quant_type", "nf4, fp4", "'x'"]),
    ("decode_absmax: a tensor", lambda: lk.decode_absmax(W), T, ["QuantizedWeight", "Tensor"]),
    (
        "decode_absmax: absmax2",
        lambda: lk.decode_absmax(replace(QW, absmax2=torch.rand(2))),
        V,
        ["absmax2", "float32 [1]", "[2]"],
    ),
    ("decode_absmax: code2", lambda: lk.decode_absmax(replace(QW, code2=torch.rand(16))), V, ["code2", "[256]", "[16]"]),
    (
        "decode_absmax: offset",
        lambda: lk.decode_absmax(replace(QW, offset=QW.offset.half())),
        V,
        ["offset", "float32", "float16"],
    ),
    # qlora_linear
    ("qlora_linear: x is no tensor", lambda: linear(x=[1.0]), T, ["x", "torch.Tensor", "list"]),
    ("qlora_linear: a dense weight", lambda: linear(qw=W), T, ["weight", "QuantizedWeight", "lora_kernels.quantize", "Tensor"]),
    ("qlora_linear: K", lambda: linear(x=torch.randn(2, 63)), V, ["x", "K=64", "[6, 64]", "[2, 63]"]),
    ("qlora_linear: scalar x", lambda: linear(x=torch.tensor(1.0)), V, ["x", "K=64", "[]"]),
    ("qlora_linear: 3-D weight", lambda: linear(qw=lk.quantize(torch.randn(2, 3, 64))), V, ["[2, 3, 64]"]),
    ("qlora_linear: empty weight", lambda: linear(torch.ones(3, 0), EMPTY, None, None), V, ["weight", "one element", "[6, 0]"]),
    ("qlora_linear: integers", lambda: linear(x=X.long()), T, ["x", "float32", "int64"]),
    ("qlora_linear: float64", lambda: linear(x=X.double()), T, ["x", "float64", "use_backend('reference')"]),
    ("qlora_linear: x elsewhere", lambda: linear(x=torch.empty(3, 64, **META)), V, ["packed", "meta", "cpu"]),
    ("qlora_linear: A alone", lambda: linear(lora_B=None), V, ["lora_A and lora_B", "together", "lora_B"]),
    ("qlora_linear: B alone", lambda: linear(lora_A=None), V, ["lora_A and lora_B", "together", "lora_A"]),
    ("qlora_linear: A", lambda: linear(lora_A=A[:, :-1]), V, ["lora_A", "[2, 64]", "[2, 63]"]),
    ("qlora_linear: A transposed", lambda: linear(lora_A=A.T), V, ["lora_A", "[r, K]", "[64, 2]"]),
    ("qlora_linear: rank 0", lambda: linear(lora_A=A[:0], lora_B=B[:, :0]), V, ["lora_A", "r >= 1", "[0, 64]"]),
    ("qlora_linear: 1-D A", lambda: linear(lora_A=A[0]), V, ["lora_A", "[r, K]", "[64]"]),
    ("qlora_linear: B", lambda: linear(lora_B=torch.randn(6, 3)), V, ["lora_B", "[N, r]", "[6, 2]", "[6, 3]"]),
    ("qlora_linear: integer A", lambda: linear(lora_A=A.int()), T, ["lora_A", "float32", "int32"]),
    ("qlora_linear: float64 B", lambda: linear(lora_B=B.double()), T, ["lora_B", "float32", "float64"]),
    ("qlora_linear: A elsewhere", lambda: linear(lora_A=A.to("meta")), V, ["lora_A", "cpu", "meta"]),
    ("qlora_linear: A is no tensor", lambda: linear(lora_A=[1.0]), T, ["lora_A", "torch.Tensor or None", "list"]),
    ("qlora_linear: bias is no tensor", lambda: linear(bias=1.0), T, ["bias", "torch.Tensor or None", "float"]),
    ("qlora_linear: blocksize", lambda: linear(qw=replace(QW, blocksize=64.0)), V, ["blocksize", "32, 64", "64.0"]),
    ("qlora_linear: quant_type", lambda: linear(qw=replace(QW, quant_type=None)), V, ["quant_type", "nf4, fp4", "None"]),
    ("qlora_linear: bias", lambda: linear(bias=torch.randn(5)), V, ["bias", "[N]", "[6]", "[5]"]),
    ("qlora_linear: 2-D bias", lambda: linear(bias=torch.randn(1, 6)), V, ["bias", "[6]", "[1, 6]"]),
    ("qlora_linear: NaN scaling", lambda: linear(scaling=math.nan), V, ["scaling", "finite", "nan"]),
    ("qlora_linear: infinite scaling", lambda: linear(scaling=math.inf), V, ["scaling", "finite", "inf"]),
    ("qlora_linear: dropout 1", lambda: linear(dropout_p=1.0), V, ["dropout_p", "[0, 1)", "1.0"]),
    ("qlora_linear: dropout -0.1", lambda: linear(dropout_p=-0.1), V, ["dropout_p", "[0, 1)", "-0.1"]),
    ("qlora_linear: NaN dropout", lambda: linear(dropout_p=math.nan), V, ["dropout_p", "[0, 1)", "nan"]),
    (
        "qlora_linear: dropout without A",
        lambda: linear(lora_A=None, lora_B=None, dropout_p=0.5),
        V,
        ["dropout_p", "lora_A", "None"],
    ),
    # the ops themselves
    ("op qlora_linear: 3-D x", lambda: forward_op(x=torch.randn(1, 3, 64)), V, ["x", "K=64", "[1, 3, 64]"]),
    ("op qlora_linear: no seed", lambda: forward_op(p=0.5), V, ["seed", "int64 [1]", "None"]),
    ("op qlora_linear: seed", lambda: forward_op(p=0.5, seed=torch.tensor([1.0])), V, ["seed", "int64 [1]", "float32"]),
    ("op backward: dy", lambda: backward_op(dy=torch.randn(3, 5)), V, ["dy", "N=6", "[3, 5]"]),
    ("op backward: x", lambda: backward_op(x=torch.randn(2, 64)), V, ["x", "[3, 64]", "[2, 64]"]),
    ("op backward: x dtype", lambda: backward_op(x=X.half()), V, ["x", "float32 [3, 64]", "float16"]),
    ("op backward: no x", lambda: backward_op(x=None), V, ["x", "[3, 64]", "None"]),
    ("op backward: h", lambda: backward_op(h=torch.randn(3, 3)), V, ["h", "[3, 2]", "[3, 3]"]),
    ("op backward: needs", lambda: backward_op(needs=(True, True)), V, ["needs", "4 flags", "[True, True]"]),
    ("op backward: dA without A", lambda: backward_op(lora=(None, None, 1.0)), V, ["needs", "lora_A is None"]),
    (
        "op decode_absmax",
        lambda: ops.decode_absmax(torch.rand(3), torch.rand(1), torch.rand(256), torch.rand(1)),
        V,
        ["absmax", "uint8"],
    ),
    # the layer
    ("layer: in_features", lambda: FusedQLoRALinear(0, 4), V, ["in_features", ">= 1", "0"]),
    ("layer: out_features", lambda: FusedQLoRALinear(4, 4.0), V, ["out_features", "integer", "4.0"]),
    ("layer: r", lambda: FusedQLoRALinear(4, 4, r=-2), V, ["r must", ">= 1", "-2"]),
    ("layer: r 2.0", lambda: FusedQLoRALinear(4, 4, r=2.0), V, ["r must", "integer", "2.0"]),
    ("layer: lora_alpha", lambda: FusedQLoRALinear(4, 4, lora_alpha=math.inf), V, ["lora_alpha", "finite", "inf"]),
    ("layer: lora_alpha text", lambda: FusedQLoRALinear(4, 4, lora_alpha="8"), V, ["lora_alpha", "number", "'8'"]),
    ("layer: lora_dropout", lambda: FusedQLoRALinear(4, 4, lora_dropout=1), V, ["lora_dropout", "[0, 1)", "1"]),
    ("layer: quant_type", lambda: FusedQLoRALinear(4, 4, quant_type="nf8"), V, ["quant_type", "nf4, fp4", "'nf8'"]),
    ("layer: blocksize", lambda: FusedQLoRALinear(4, 4, blocksize=63), V, ["blocksize", "32", "63"]),
    ("layer: compute_dtype", lambda: FusedQLoRALinear(4, 4, compute_dtype=torch.int8), V, ["compute_dtype", "float32", "int8"]),
    ("layer: input", lambda: LAYER(torch.randn(2, 63)), V, ["x", "K=64", "[2, 63]"]),
    ("from_linear: kind", lambda: FusedQLoRALinear.from_linear(nn.Conv1d(2, 2, 1)), T, ["linear", "torch.nn.Linear", "Conv1d"]),
    ("from_linear: r", lambda: FusedQLoRALinear.from_linear(nn.Linear(4, 4), r="8"), V, ["r must", "integer", "'8'"]),
    ("from_linear: NaN", lambda: FusedQLoRALinear.from_linear(nan_linear()), V, ["weight", "NaN"]),
    ("from_bitsandbytes: a dense layer", lambda: FusedQLoRALinear.from_bitsandbytes(nn.Linear(4, 4)), (T, V), ["Linear4bit"]),
    ("add_adapter: taken", lambda: LAYER.add_adapter("default", AdapterConfig(2, 4)), V, ["'default'", "exists"]),
    ("add_adapter: dot", lambda: LAYER.add_adapter("a.b", AdapterConfig(2, 4)), V, ["name", "dot", "'a.b'"]),
    ("add_adapter: empty", lambda: LAYER.add_adapter("", AdapterConfig(2, 4)), V, ["name", "non-empty", "''"]),
    ("set_adapter: unknown", lambda: LAYER.set_adapter("x"), V, ["'x'", "adapters of this layer: default"]),
    ("delete_adapter: unknown", lambda: LAYER.delete_adapter("x"), V, ["'x'", "default"]),
    ("unmerge: not merged", lambda: LAYER.unmerge(), RuntimeError, ["unmerge", "not merged"]),
    ("merge: no adapter", lambda: FusedQLoRALinear(4, 4, r=0).merge(), RuntimeError, ["merge", "no active adapter"]),
    ("AdapterConfig: r True", lambda: AdapterConfig(True, 8), V, ["r must", "True"]),
    ("AdapterConfig: dropout text", lambda: AdapterConfig(2, 8, "0"), V, ["lora_dropout", "[0, 1)", "'0'"]),
    ("to_linear: integers", lambda: LAYER.to_linear(torch.int8), (T, V), ["dtype", "float32", "int8"]),
    # models and files: see also tests/layers/test_model.py and test_adapter_files.py
    ("apply_qlora: no module", lambda: lk.apply_qlora(3), T, ["model", "torch.nn.Module", "int"]),
    ("set_adapter of a model: unknown", lambda: lk.set_adapter(nn.Sequential(LAYER), "x"), V, ["'x'", "default"]),
    (
        "load_adapter: nowhere",
        lambda: lk.load_adapter(nn.Sequential(LAYER), "/no/such"),
        FileNotFoundError,
        ["adapter_config.json", "/no/such"],
    ),
    ("save_adapter: unknown", lambda: lk.save_adapter(nn.Sequential(LAYER), "/no/such", "x"), V, ["'x'", "default"]),
    ("use_backend: unknown", lambda: lk.use_backend("x").__enter__(), V, ["backend", "native, reference", "'x'"]),
]


def nan_linear():
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 1] = math.nan
    return linear


@pytest.mark.parametrize(("call", "error", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_message(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_good_calls_pass():
    """What the table spoils one argument of."""
    assert linear().shape == (3, 6)
    assert forward_op()[1].shape == (3, 2)
    assert forward_op(p=0.5, seed=SEED)[0].isfinite().all()
    assert len(backward_op()) == 4
    assert LAYER.active_adapter == "default"
    assert backends.forced() in (None, *backends.NAMES)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: lk.qlora_linear(x[..., :-1], QW, A, B),
        lambda x: lk.qlora_linear(x, QW, A, B[:-1]),
        lambda x: lk.qlora_linear(x, QW, A, None),
    ],
    ids=["x", "lora_B", "no lora_B"],
)
def test_compiled_calls_are_checked_too(call):
    """Under torch.compile the checks run on fake tensors, with the same words."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"x must|lora_B must|together"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(X)
