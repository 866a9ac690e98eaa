"""Several processes, as torchrun or accelerate launch starts them: joining them, agreeing, and failing together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

_SHARDERS = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


class AnotherProcessError(RuntimeError):
    """Raised here because another process failed, which says why itself."""


def failed_elsewhere(error: RuntimeError) -> bool:
    """Whether `error` says no more than that another process failed or is gone."""
    return isinstance(error, (AnotherProcessError, dist.DistError)) or (world_size() > 1 and "gloo" in str(error))


def rank() -> int:
    """Number of this process; 0 also for a program that was started alone."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that the launcher started, if it started several; in a program started alone nothing happens.

    Raises:
        ValueError: `accelerate launch` was told to shard the model.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several or _joined():
        yield
        return
    for name, what in _SHARDERS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(
                f"accelerate launch: each process trains a whole model here, so {what} must be off (distributed_type must be "
                "MULTI_GPU or MULTI_CPU); lora_kernels/examples/fsdp2.py shows how to shard a model"
            )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # after an error the others may be waiting in it: the launcher ends them


@contextmanager
def together() -> Iterator[None]:
    """Ends all processes if the block fails in one: the first that failed raises its error, the others `AnotherProcessError`.

    The block must not communicate after it may have failed in one process alone.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    failed = gather(error is not None)
    if any(failed):
        first = failed.index(True)
        raise error if error is not None and first == rank() else AnotherProcessError(f"process {first} failed")


def first_only(fn: Callable[P, None]) -> Callable[P, None]:
    """Does nothing in all processes but the first."""

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if rank() == 0:
            fn(*args, **kwargs)

    return call


def gather(value: T) -> list[T]:
    """The value of each process, in the order of ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
