"""`Layer`: its fields and their order are named once, and the ops' arguments follow from them."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import layer
from lora_kernels.layer import FIELDS, TENSORS, Layer
from lora_kernels.testing import Case, Inputs, make_inputs

CASES = [Case(3, 40, 96, r=4, bias=True, dropout=0.1), Case(3, 7, 96, r=0, double_quant=False, quant_type="fp4")]


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(request.param)


def test_weight_and_rank(inputs: Inputs) -> None:
    got, case = inputs.layer, inputs.case
    assert (got.r, got.shape, got.quant_type) == (case.r, (case.N, case.K), case.quant_type)
    assert torch.equal(got.weight.dequantize(torch.float32), inputs.qw.dequantize(torch.float32))
    assert Layer.of(inputs.qw)[8:] == (None, None, 1.0, None, 0.0, None)


def test_tensors_are_all_that_a_layer_holds(inputs: Inputs) -> None:
    held = {name for name, value in inputs.layer._asdict().items() if isinstance(value, torch.Tensor)}
    assert held == {name for name, t in zip(TENSORS, inputs.layer.tensors(), strict=True) if t is not None}
    meta = [None if t is None else t.to("meta") for t in inputs.layer.tensors()]
    moved = inputs.layer.with_tensors(meta)
    assert all(a is b for a, b in zip(moved.tensors(), meta, strict=True))
    assert [getattr(moved, n) for n in FIELDS if n not in TENSORS] == [
        getattr(inputs.layer, n) for n in FIELDS if n not in TENSORS
    ]


def test_lists_and_back() -> None:
    layers = [make_inputs(case).layer for case in CASES]
    lists = layer.to_lists(layers)
    assert lists[FIELDS.index("shape")] == [40, 7]
    for got, want in zip(layer.from_lists(96, lists), layers, strict=True):
        assert all(a is b or a == b for a, b in zip(got, want, strict=True))


def test_registered_ops_take_the_fields_in_this_order() -> None:
    def names(op: str) -> list[str]:
        return [a.name for a in getattr(torch.ops.lora_kernels, op).default._schema.arguments]

    assert [n for n in names("qlora_linear") if n in FIELDS] == list(FIELDS)
    grouped = ["N" if n == "shape" else n for n in FIELDS]
    for op in ("qlora_linear_group", "qlora_linear_group_backward"):
        assert [n for n in names(op) if n in grouped] == grouped
