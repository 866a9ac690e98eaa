"""Runs the Gluon kernel's own Python body on tensors of the CPU, one program at a time; Gluon has no interpreter.

Layouts mean nothing here, and all threads of a program go in step.  What is asynchronous is as late and as early as the
hardware may make it: a copy spoils its buffer when it is issued and fills it at the wait, and a matrix instruction fails if its
operands change before it is waited for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.triton import gluon_linear, tiles
from lora_kernels.backends.triton.launch import Launch


def run(launch: Launch) -> None:
    """Does a launch of `linear_gluon` that was recorded with real tensors."""
    for program in range(launch.grid[0]):
        machine = Machine(program)
        args = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in launch.args]
        machine.bind(launch.kernel)(*args, **launch.meta)
        assert not machine.in_flight and not machine.groups and not machine.open


@dataclass
class Pointer:
    data: Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        assert bitcast and isinstance(self.at, int) and self.at == 0
        return Pointer(self.data.view(dtype))


class Shared(SimpleNamespace):
    """Tiles in shared memory, or one of them."""

    data: Tensor

    def index(self, i: int) -> Shared:
        return Shared(data=self.data[i])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(data=self.data.permute(order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


@dataclass
class Machine:
    program: int
    in_flight: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """What the operands of each matrix instruction not waited for held, and the operands."""
    groups: list[list[tuple[Shared, Pointer]]] = field(default_factory=list)
    open: list[tuple[Shared, Pointer]] = field(default_factory=list)
    """Copies under way, by the group they were committed in, and those of no group yet."""

    def bind(self, kernel: Any) -> Callable[..., Any]:
        """The function that is compiled, with torch for Triton's language."""

        def minimum(a: Any, b: Any) -> Any:
            return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

        def multiple_of(a: int, n: int) -> int:
            assert a % n == 0
            return a

        def static_assert(condition: bool) -> None:
            assert condition

        anything = SimpleNamespace(get_default_for=lambda *a: None)
        layouts = dict.fromkeys(("SliceLayout", "BlockedLayout", "NVMMADistributedLayout"), lambda *a, **k: None)
        language = SimpleNamespace(
            **layouts, NVMMASharedLayout=anything, float32=torch.float32, int64=torch.int64, int32=torch.int32,
            pointer_type=lambda dtype: dtype, num_warps=lambda: 8, program_id=lambda axis: torch.tensor(self.program),
            arange=lambda a, b, layout: torch.arange(a, b), minimum=minimum, cdiv=lambda a, b: -(a // -b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), static_range=range, multiple_of=multiple_of,
            static_assert=static_assert, convert_layout=lambda t, layout: t, load=load, store=store,
            allocate_shared_memory=lambda dtype, shape, layout: Shared(data=torch.full(shape, torch.nan, dtype=dtype)),
            debug_barrier=lambda: None,
        )  # fmt: skip
        world = {"gl": language, "tl": language, "range": lambda a, b, c=1: range(int(a), int(b), int(c))}
        world |= {"cast": lambda t, dtype: t.to(dtype), "to_float": Tensor.float, "mul_add": lambda a, b, c, ptx: a * b + c}
        world |= {"fence_async_shared": lambda: None, "_copy": self.copy, "async_copy": self, "decode": decode}
        world["W_TILES"] = gluon_linear.W_TILES.value
        world |= {"warpgroup_mma": self.mma, "warpgroup_mma_wait": self.mma_wait}
        for callee in (tiles.swizzle, gluon_linear.scale_of):
            world[callee.__name__] = FunctionType(callee.fn.__code__, world)
        return FunctionType(kernel.fn.__code__, world)

    def copy(self, tile: Shared, source: Pointer) -> None:
        tile.data.fill_(torch.nan)
        self.open.append((tile, source))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for tile, source in self.groups.pop(0):
                tile.store(load(source))

    def mma(self, a: Shared, b: Shared, acc: Tensor, is_async: bool) -> Tensor:
        late = [tile.data.data_ptr() for group in self.groups for tile, _ in group]
        assert a.data.data_ptr() not in late, "a copy into an operand is still under way"
        self.in_flight += [(torch.cat([a.data, b.data.T]), a.data, b.data)]
        return acc + a.data.float() @ b.data.float()

    def mma_wait(self, outstanding: int, deps: list[Tensor]) -> Tensor:
        while len(self.in_flight) > outstanding:
            before, a, b = self.in_flight.pop(0)
            assert torch.equal(before, torch.cat([a, b.T])), "an operand changed under a matrix instruction"
        return deps[0]


def load(source: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    at, mask = torch.broadcast_tensors(torch.as_tensor(source.at), torch.as_tensor(mask))
    return torch.where(mask, source.data[torch.where(mask, at, 0)], torch.tensor(other).to(source.data.dtype))


def store(target: Pointer, value: Tensor, mask: Tensor) -> None:
    target.data[torch.as_tensor(target.at)[mask]] = value[mask]


def decode(words: Tensor, scale: Tensor, lut: None, R: int, W: int, DT: torch.dtype, TABLE: str) -> Tensor:
    assert words.shape == (R, W) and scale.shape == (R, 1)
    values = [struct.unpack(">f", bytes.fromhex(v))[0] for v in re.findall("0f([0-9A-F]{8})", TABLE)]
    shifts = torch.tensor([4, 0, 12, 8, 20, 16, 28, 24])
    codes = (words[:, :, None] >> shifts) & 15
    return (torch.tensor(values)[codes] * scale[:, :, None]).to(DT).reshape(R, W * 8)
