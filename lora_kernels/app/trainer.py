"""Transformers' `Trainer` for adapters over a frozen 4-bit base: small checkpoints, a time limit, progress on the terminal."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .. import processes
from ..adapter_files import load_adapter, save_adapter, writing
from .data import IGNORED
from .threads import Watch

PATIENCE = 3
"""A run that is given a number of steps as well as a time may take so many times that time for them."""


def lr_factor(progress: float) -> float:
    """The learning rate as a part of its peak, at `progress` in [0, 1]: up over the first 5 %, then down a half cosine."""
    return min(1.0, max(progress, 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Monitor(TrainerCallback):
    """Watches training: records losses, shows progress, and decides when to measure, to save and to stop.

    Attributes:
        log: `history`, `held_out`, `train_seconds` and `tokens` of the whole run, which it adds to.
        interrupted: whether Ctrl-C was pressed, in any process.
    """

    def __init__(
        self,
        log: dict[str, Any],
        write_log: Callable[[], None],
        console: Console,
        minutes: float | None,
        evals: int,
        save_steps: int,
        min_steps: int = 1,
        cores: Watch | None = None,
    ) -> None:
        """Makes a monitor.

        Args:
            write_log: puts the log on disk; called at every checkpoint.
            minutes: training stops after steps of that time together; None for no limit.
            evals: times that the held-out loss is measured on the way.
            save_steps: steps between checkpoints.
            min_steps: a run that `minutes` would end before that many steps gets up to `PATIENCE` times as long.
            cores: the watch of the threads, where they do the computing.
        """
        self.log, self.write_log, self.console = log, write_log, console
        self.limit = minutes * 60 if minutes else math.inf
        self.evals, self.save_steps, self.min_steps, self.cores = evals, save_steps, min_steps, cores
        self.interrupted = False
        self._signalled = False
        self._evals_done = self._tokens_seen = 0
        self._start = self._seconds = self._seconds_before = 0.0
        self._warm = self._over = False
        self._began = self._step_began = self._last_line = 0.0
        self._lines = 0
        self._bar: Progress | None = None

    def progress(self, step: int, total: int) -> float:
        """How much of the run is done, in [0, 1]: of its steps or of its time, whichever is more.

        The time is that of steps alone, without the first one of this process, which compiles and warms up.
        """
        time = max(min(self._seconds / self.limit, step / self.min_steps), self._seconds / (PATIENCE * self.limit))
        return min(1.0, max(step / total, time))

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through training steps, padding not counted, over the time of these steps."""
        return self.log["tokens"] / self.log["train_seconds"] if self.log["train_seconds"] else 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Shows the bar, and turns Ctrl-C into a stop after the step; a second Ctrl-C raises KeyboardInterrupt."""

        def stop(*_: Any) -> None:
            if self._signalled:
                raise KeyboardInterrupt
            self._signalled = True
            self.console.print("\nstopping after this step (Ctrl-C again: at once, without saving)")

        previous = signal.signal(signal.SIGINT, stop)
        try:
            if self.console.is_terminal:
                numbers = TextColumn("{task.percentage:>3.0f}%  {task.fields[numbers]}")
                with Progress(BarColumn(24), numbers, console=self.console, refresh_per_second=4) as self._bar:
                    self._bar.add_task("", total=1.0, numbers="first step")
                    yield
            else:
                yield
        finally:
            self._bar = None
            signal.signal(signal.SIGINT, previous)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._last_line = time.monotonic()
        self._seconds = self.log["train_seconds"]
        self._tokens_seen = state.num_input_tokens_seen
        self._start = self.progress(state.global_step, state.max_steps)
        self._evals_done = int(self._start * (self.evals + 1))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began, self._seconds_before = time.monotonic(), self._seconds

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets clock and interruption to the same on all processes, so that their schedules and decisions are the same."""
        now = self._seconds_before + (time.monotonic() - self._step_began if self._warm else 0.0)
        self._warm = True
        clocks, signals = zip(*processes.gather((now, self._signalled)), strict=True)
        self._seconds, self.interrupted = max(clocks), any(signals)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds, tokens = time.monotonic() - self._step_began, state.num_input_tokens_seen - self._tokens_seen
        self.log["train_seconds"] += seconds
        self.log["tokens"] += tokens
        self._tokens_seen = state.num_input_tokens_seen
        if self.cores is not None:
            self.cores.step(seconds, tokens)
        done = self.progress(state.global_step, state.max_steps)
        if self._seconds >= self.limit and done < 1 and not self._over:
            self._over = True
            most = f"{self.min_steps} steps, at most {PATIENCE * self.limit / 60:.3g} minutes"
            self.console.print(f"{self.limit / 60:.3g} minutes are over after {state.global_step} steps: goes on up to {most}")
        last = self.interrupted or done >= 1
        evals = int(done * (self.evals + 1))
        control.should_evaluate = evals > self._evals_done and not last
        self._evals_done = evals
        control.should_save = last or state.global_step % self.save_steps == 0
        control.should_training_stop = last

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            numbers = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
            numbers |= {"tokens": self.log["tokens"], "threads": torch.get_num_threads()}
            self.log["history"].append({"step": state.global_step, **numbers})
            self._show(state, logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.log["held_out"].append({"step": state.global_step, "loss": metrics["eval_loss"]})
        self.console.print(f"held-out loss {metrics['eval_loss']:.4f} at step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write_log()

    def _show(self, state: Any, loss: float) -> None:
        now, done = time.monotonic(), self.progress(state.global_step, state.max_steps)
        left = ""
        if self._seconds > 0:  # the first step is not counted, and tells nothing of the next
            left = f"{_clock((now - self._began) * (1 - done) / max(done - self._start, 1e-9))} left  "
        numbers = f"step {state.global_step}  loss {loss:.3f}  {self.tokens_per_second:.0f} tokens/s  {left}{_memory()}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, numbers=numbers)
        elif now - self._last_line > 10 or done >= 1 or not self._lines:
            self._last_line, self._lines = now, self._lines + 1
            self.console.print(f"{done:4.0%}  {numbers}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / 1e9:.1f} GB on the GPU"
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


class _Sampler(LengthGroupedSampler):
    """Batches of like length, in an order that depends on seed and epoch alone: a resumed run goes on in it."""

    def __init__(self, seed: int, batch_size: int, dataset: Any) -> None:
        super().__init__(batch_size, dataset, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class QLoRATrainer(Trainer):
    """Trains the adapters of a model with `FusedQLoRALinear` layers.

    Checkpoints hold the adapter and the state of optimizer, schedule and random numbers, but not the base; one is kept, and it
    appears under its name when complete.
    """

    control: Any

    def __init__(self, monitor: Monitor, **kwargs: Any) -> None:
        self.monitor = monitor
        super().__init__(**kwargs, callbacks=[monitor])
        self.remove_callback(PrinterCallback)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all modules in every step."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`lr_factor` over the progress of the run, so that a time limit ends the schedule too."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: lr_factor(self.monitor.progress(step, num_training_steps)),
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> _Sampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _Sampler(self.args.seed, batch, self.train_dataset)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss of a token of the held-out records on average, over whatever batches and processes they are spread."""
        model, mine = self.model.eval(), self.eval_dataset[processes.rank() :: processes.world_size()]
        loss, tokens = 0.0, 0
        for i in range(0, len(mine), self.args.eval_batch_size):
            batch = self._prepare_inputs(self.data_collator(mine[i : i + self.args.eval_batch_size]))
            n = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss, tokens = loss + n * model(**batch).loss.item(), tokens + n
        losses, counts = zip(*processes.gather((loss, tokens)), strict=True)
        metrics = {"eval_loss": sum(losses) / sum(counts)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        tmp = folder / f".{name}.tmp"  # the same for all processes: each leaves its random state there
        with processes.together():
            tmp.mkdir(exist_ok=True)
        try:
            self.args.output_dir = str(tmp)
            with processes.together(), writing(folder / name):  # nothing is moved before all have written
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(folder)
        with processes.together():
            if self.args.should_save:
                shutil.rmtree(folder / name, ignore_errors=True)
                (tmp / name).rename(folder / name)
                for old in {*folder.glob("checkpoint-*"), tmp} - {folder / name}:
                    shutil.rmtree(old)
