"""How a layer keeps a 4-bit weight: a parameter of packed bytes, and the scales beside it, under bitsandbytes' keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .formats import QuantizedWeight

SCALES = ("absmax", "absmax2", "code2", "offset")
"""The parts of a `QuantizedWeight` that are no parameters."""


class PackedWeight:
    """A layer whose `weight` is packed bytes and comes, in a state dict, with its scales under bitsandbytes' keys."""

    out_features: int
    in_features: int
    weight: nn.Parameter
    _unmerged: QuantizedWeight | None = None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        raise NotImplementedError

    def set_weight(self, qw: QuantizedWeight) -> None:
        """Takes the bytes and scales of `qw`, which are shared, not copied."""
        raise NotImplementedError

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint, which looks up each part of a key as an attribute."""
        return {"weight": "_weight_keys"}

    @property
    def _weight_keys(self) -> _Keys:
        return _Keys()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        own = {k: v for k, v in state_dict.items() if k == key or k.startswith(f"{key}.")}
        rest = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in own}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)  # type: ignore[misc]
        missing_keys += [k for k in missing if k != key or key not in own]
        if key not in own:
            return
        weight = self.weight
        if hasattr(weight, "device_mesh") and len(own) == 1:  # a process that gets its scales from another one
            if local_metadata.get("assign_to_params_buffers", False):
                self.weight = nn.Parameter(own[key], requires_grad=False)
            else:
                weight.detach().copy_(own[key])
            return
        try:
            qw = QuantizedWeight.from_state_dict(own, key)
        except (KeyError, ValueError) as e:
            error_msgs.append(e.args[0])
            return
        if qw.shape != (self.out_features, self.in_features):
            error_msgs.append(f"{key}: shape must be {[self.out_features, self.in_features]}, got {list(qw.shape)}")
            return
        self._unmerged = None
        if local_metadata.get("assign_to_params_buffers", False):
            self.set_weight(qw)
        elif hasattr(weight, "device_mesh"):  # sharded: the parameter must stay the same object
            weight.detach().copy_(qw.packed)
            scales = self.quantized_weight
            for name in SCALES:
                if (t := getattr(scales, name)) is not None:
                    t.copy_(getattr(qw, name))
        else:
            here = qw.to(self.weight.device)
            self.set_weight(replace(here, **{n: t.clone() for n in ("packed", *SCALES) if (t := getattr(here, n)) is not None}))


class _Keys:
    """Has every attribute: it stands for the entries of a state dict that belong to a packed weight."""

    def __getattr__(self, name: str) -> _Keys:
        if name.startswith("_"):
            raise AttributeError(name)
        return self
