"""`verify`: which layers of a model are fused, by which backend, and why not."""

import pytest
from helpers import CPU
from torch import nn

import lora_kernels as lk
from lora_kernels import FusedQLoRALinear, backends, env

pytestmark = pytest.mark.usefixtures("one_thread")


def test_verify(backend):
    model = nn.ModuleDict(
        {"a": FusedQLoRALinear(8, 8), "b": FusedQLoRALinear(8, 8, r=0), "c": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)}
    )
    report = lk.verify(model)
    a, b, c, head = report.rows
    assert [r.name for r in report.rows] == ["a", "b", "c", "lm_head"]
    assert [r.backend for r in report.rows] == [backend, backend, None, None]
    fused = backend != "reference"
    assert [r.fused for r in report.rows] == [fused, fused, False, False]
    assert (a.adapter, b.adapter) == ("default", None)
    assert "apply_qlora quantizes it" in c.reason
    assert "excluded" in head.reason
    text = str(report)
    assert all(word in text for word in ("layer", "backend", "FusedQLoRALinear", f"{2 * fused} of 4 linear layers fused"))
    with pytest.raises(RuntimeError, match=r"c: a dense layer"):
        lk.verify(model, strict=True)
    if not fused:
        assert "plain torch" in a.reason
        with pytest.raises(RuntimeError, match="a: plain torch"):
            lk.verify(model, strict=True, exclude_modules=("c", "lm_head"))
        return
    assert lk.verify(model, strict=True, exclude_modules=("c", "lm_head")).fused == (a, b)
    model["a"].merge()
    assert "merged" in lk.verify(model).rows[0].reason


def test_verify_says_why_it_is_not_fused(monkeypatch):
    """On a machine where nothing was compiled each layer says so, and what to do."""
    monkeypatch.setattr(env, "backend", lambda: None)
    for name in backends.order(CPU):
        if name != "reference":
            monkeypatch.setattr(backends.load(name), "unavailable", lambda device: "it is not built: do this")
    monkeypatch.setattr(backends, "best", backends.best.__wrapped__)  # not what was found before
    model = nn.Sequential(FusedQLoRALinear(8, 8))
    (row,) = lk.verify(model).rows
    assert (row.fused, row.backend) == (False, "reference")
    assert "native: it is not built: do this" in row.reason
    with pytest.raises(RuntimeError, match="0: plain torch, because native: it is not built"):
        lk.verify(model, strict=True)
    with pytest.raises(RuntimeError, match="no fused layer"):
        lk.verify(nn.Sequential(nn.ReLU()), strict=True)


def test_verify_knows_zero3():
    model = lk.apply_qlora(nn.Sequential(nn.Linear(8, 4)), r=0)
    model[0].weight.ds_id = 3
    with pytest.raises(RuntimeError, match=r"1 linear layers are not fused: 0: DeepSpeed's ZeRO-3.*ZeRO-2 or FSDP2"):
        lk.verify(model, strict=True)
