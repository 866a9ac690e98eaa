"""What of a model runs in fused kernels: `verify` and its `Report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from . import backends
from .layer import wants
from .model import is_bitsandbytes, is_peft, matches
from .nn import FusedQLoRALinear


@dataclass(frozen=True)
class Row:
    """One linear layer in a `Report`."""

    name: str
    kind: str
    fused: bool
    backend: str | None
    adapter: str | None
    reason: str
    quant_type: str | None = None
    blocksize: int | None = None

    @property
    def format(self) -> str:
        """`nf4/64`: quant_type and blocksize; `-` for a layer that is not in 4 bits."""
        return f"{self.quant_type}/{self.blocksize}" if self.quant_type else "-"


@dataclass(frozen=True)
class Report:
    """What `verify` found: one row a linear layer.  `print(report)` shows a table."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.fused)

    @property
    def not_fused(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if not r.fused)

    def __str__(self) -> str:
        cells = [("layer", "class", "fused", "backend", "format", "adapter", "why")]
        for r in self.rows:
            fused = "yes" if r.fused else "no"
            cells.append((r.name, r.kind, fused, r.backend or "-", r.format, r.adapter or "-", r.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, f"{len(self.fused)} of {len(self.rows)} linear layers fused"])


def verify(model: nn.Module, strict: bool = False, exclude_modules: str | Sequence[str] = ("lm_head",)) -> Report:
    """Says of every linear layer whether it runs in fused kernels, by which backend, and why.

    Args:
        strict: raise if a layer that is not excluded is not fused.
        exclude_modules: layers that are meant to stay dense, named as in `apply_qlora`.

    Raises:
        RuntimeError: `strict`, and a layer is not fused; the message lists them.
    """
    rows: list[Row] = []
    done: set[str] = set()
    for name, module in model.named_modules():
        if any(p in done for p in ("", *_parents(name))):
            continue
        row = _row(name, module, any(matches(p, exclude_modules) for p in _parents(name)))
        if row is not None:
            rows.append(row)
            done.add(name)
    report = Report(tuple(rows))
    if strict:
        bad = [r for r in report.not_fused if not any(matches(p, exclude_modules) for p in _parents(r.name))]
        if bad or not report.fused:
            listed = "; ".join(f"{r.name}: {r.reason}" for r in bad) or "the model has no fused layer"
            raise RuntimeError(f"{len(bad)} linear layers are not fused: {listed}")
    return report


def _parents(name: str) -> list[str]:
    """`name` and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _row(name: str, module: nn.Module, excluded: bool) -> Row | None:
    """The row of a linear layer, None for another module."""
    kind = type(module).__name__
    if isinstance(module, FusedQLoRALinear) or hasattr(module, "fused_state"):
        return _fused_row(name, module)
    if is_peft(module):
        base = module.get_base_layer()  # type: ignore[operator]
        if not isinstance(base, (nn.Linear, FusedQLoRALinear)):
            return None
        if is_bitsandbytes(base) and not hasattr(base, "fused_state"):
            return Row(name, kind, False, None, None, "a bitsandbytes layer: accelerate(model) makes it fused")
        where = type(module).__module__.removesuffix(".layer").rpartition(".")[2]
        ours = hasattr(base, "fused_state") or isinstance(base, FusedQLoRALinear)
        return Row(name, kind, False, None, None, f"{where}: PEFT computes it {'on our base layer' if ours else 'densely'}")
    if not isinstance(module, nn.Linear):
        return None
    if excluded:
        why = "excluded: stays as it is"
    elif is_bitsandbytes(module):
        why = "a bitsandbytes layer: apply_qlora or accelerate takes it over without touching its bytes"
    else:
        why = "a dense layer: apply_qlora quantizes it"
    return Row(name, kind, False, None, None, why)


def _fused_row(name: str, layer: nn.Module) -> Row:
    """The row of a layer of ours; layers of `integrations` say through `fused_state` what they can't compute in one call."""
    kind, problem = type(layer).__name__, None
    if isinstance(layer, FusedQLoRALinear):
        weight, adapter, what = layer.quantized_weight, layer.active_adapter, wants([layer.as_layer()])
        why = "adapter in the same call" if adapter and layer.adapters_enabled else "no active adapter"
        if layer.merged:
            why = "adapter merged into the 4-bit weight"
    else:
        weight, adapter, why, problem = layer.fused_state()  # type: ignore[operator]
        what = (weight.quant_type,)
    format = (weight.quant_type, weight.blocksize)
    device = weight.device
    try:
        forward, backward = (backends.picked(op, device, *what) for op in ("qlora_linear", "qlora_linear_backward"))
    except RuntimeError as e:
        return Row(name, kind, False, None, adapter, str(e), *format)
    backend = forward if forward == backward else f"{forward}, backward {backward}"
    if hasattr(weight.packed, "ds_id"):
        problem = "DeepSpeed's ZeRO-3 holds the weight in parts, which 4-bit layers can't be computed from: use ZeRO-2 or FSDP2"
    elif "reference" in (forward, backward):
        op = "qlora_linear" if forward == "reference" else "qlora_linear_backward"
        better = [f"{n}: {why}" for n, why in backends.choices(op, device, *what) if why]
        problem = "plain torch is forced" if backends.forced() else f"plain torch, because {'; '.join(better)}"
    return Row(name, kind, problem is None, backend, adapter, problem or why, *format)
