"""An epoch of a run, step by step: what it trains on, tells and saves, and when it stops.

Crops, frames, texts and the order of the clips are functions of (seed, epoch, number), so an epoch can be begun at any step of
it.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evaat_fast.data.dataset import ClipDataset
from evaat_fast.model import CLIPTokenizer
from evaat_fast.train import checkpoint, inputs
from evaat_fast.train.checkpoint import Position, Saver
from evaat_fast.train.config import Config
from evaat_fast.train.log import Log, Progress
from evaat_fast.train.meter import Meter
from evaat_fast.train.ranks import Wishes
from evaat_fast.train.sampler import EpochSampler
from evaat_fast.train.schedules import warmup
from evaat_fast.train.steps import Steps, later
from evaat_fast.train.stop import Signals, Stopped

SAVE, STOP = 1, 2  # what a process wishes after a step
_SPIKE_OF, _SPIKE_FROM = 50, 10  # losses that a spike is compared with, at most and at least


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number, or the loss rose as train.spike does not allow. What was trained
    before that step is saved."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """data: the training split. sampler: of its batches. tokenize: the model's."""

    data: ClipDataset
    sampler: EpochSampler
    tokenize: CLIPTokenizer


@dataclasses.dataclass(frozen=True)
class Told:
    """log: of the run. progress: what people see. meter: how fast it is."""

    log: Log
    progress: Progress
    meter: Meter


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A step of an epoch that was launched: its number there, learning rate, largest loss that is allowed, seconds that its
    batch was waited for; what its loss and its gradient's norm become."""

    step: int
    lr: float
    limit: float
    waited: float
    loss: Callable[[], float]
    norm: Callable[[], float]

    def good(self, loss: float, norm: float) -> bool:
        """Whether `Steps` has updated anything, which it judges alike."""
        return math.isfinite(loss) and math.isfinite(norm) and loss <= self.limit


class Loop:
    """Trains epoch by epoch.

    Args:
        steps: Steps. given: Inputs. config: a Config. told: Told. save: a Saver. signals: that end the run.
    """

    def __init__(self, steps: Steps, given: Inputs, config: Config, told: Told, save: Saver, signals: Signals) -> None:
        self.steps, self.given, self.config, self.told = steps, given, config, told
        self.save, self.signals, self._wishes = save, signals, Wishes(steps.ranks)
        self._own = 0  # steps since the process began
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPIKE_OF + 2)  # (step of the run, its loss)
        self._replaced = 0  # of all processes, when the epoch began
        self.heard = 0  # what a process wished in the last step of an epoch: 0, SAVE or STOP

    def replaced(self) -> int:
        """How many clips of this process's life could not be read, on all processes together."""
        return sum(self.steps.ranks.gather(self.given.data.replaced))

    def epoch(self, at: Position, rng: Mapping[str, Any] | None = None) -> Position:
        """Trains one epoch, or what is left of it.

        Args:
            at: where the run stands. rng: of the checkpoint that it goes on from in the midst of an epoch.

        Returns:
            Where it stands after the last step, which is still of this epoch. `heard` says whether it should be saved or end.

        Raises:
            Diverged: a step was bad; Stopped: a signal came; what was trained is saved.
        """
        steps, config, sampler = self.steps, self.config, self.given.sampler
        steps.model.train()
        self.given.data.set_epoch(at.epoch)
        sampler.epoch = at.epoch
        if not self._recent:
            first = at.epoch * len(sampler) + at.step - len(at.recent)
            self._recent.extend(enumerate(at.recent, first))
        self._replaced = self.replaced() - at.replaced
        began, given = time.perf_counter() - at.seconds, at
        batches = self._batches(at.step)
        if rng is not None:  # after the loader has drawn from it
            checkpoint.restore_rng(rng)
        pending: _Launched | None = None
        heard = 0

        def settled(at: Position) -> Position:
            """Reads the last step's loss, when the next one is launched, so that the GPU never waits for the log."""
            nonlocal pending
            if pending is None:
                return at
            last, pending = pending, None
            loss, norm = last.loss(), last.norm()
            self._judge(at, last, loss, norm, began)
            self._tell(at, last, loss, norm)
            self._recent.append((at.epoch * len(sampler) + last.step, loss))
            return dataclasses.replace(at, step=last.step + 1, loss=at.loss + loss, waited=at.waited + last.waited)

        for step in range(at.step, len(sampler)):
            lr, limit = self._rate(at.epoch, step), self._limit(at.epoch * len(sampler) + step)
            steps.set_lr(lr)
            if config.train.spike:
                steps.set_limit(limit)
            try:
                batch, waited = next(batches)
                loss = later(steps(batch))
            except Exception:
                self._rescue(at, pending, began)
                raise
            launched = _Launched(step, lr, limit, waited, loss, later(steps.norm))
            if self._own == 0:
                self.told.meter.know(steps.model, batch["text"].shape[1], config.model.patch_dropout)
            at = settled(at)
            pending = launched
            self._own += 1
            heard = self._wishes(STOP if self.signals.heard else SAVE if self.save.due(self._own) else 0)
            if heard and step + 1 < len(sampler):
                at = self._saved(settled(at), began, must=heard == STOP)
                if heard == STOP:
                    self.stop(at)
        at = settled(at)
        heard = max(heard, self._wishes.last())
        assert at.step == len(sampler) > given.step
        self.heard = heard
        return self._now(at, began)

    def stop(self, at: Position) -> None:
        """Raises Stopped, for a signal that this process or another one has heard."""
        number = max(self.steps.ranks.gather(self.signals.heard))
        self.signals.heard = self.signals.heard or number
        where = f"epoch {at.epoch + 1}, after step {at.step} of {len(self.given.sampler)}" if at.step else f"epoch {at.epoch}"
        text = f"stopped by {self.signals.name} in {where}, which is saved" if self.steps.ranks.main else ""
        raise Stopped(text, number)

    def _batches(self, first: int) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """Batches from one of them on, each with the seconds that it was waited for. The loader has begun when this returns."""
        config, given = self.config, self.given
        loaded = iter(
            inputs.loader(config, given.data, given.sampler, given.tokenize, self.steps.device, self.steps.ranks, first)
        )

        def timed():
            while True:
                begin = time.perf_counter()
                batch = next(loaded, None)
                if batch is None:
                    return
                yield batch, time.perf_counter() - begin

        return timed()

    def _rate(self, epoch: int, step: int) -> float:
        config, length = self.config, len(self.given.sampler)
        return warmup(
            epoch * length + step,
            lr=config.optim.lr,
            steps=config.train.epochs * length,
            warmup_steps=round(config.schedule.warmup_epochs * length),
            start_lr=config.schedule.start_lr,
            end_lr=config.schedule.end_lr,
            name=config.schedule.name,
        )

    def _limit(self, step: int) -> float:
        """The largest loss that a step of the run may have."""
        # Of losses that are known by then whether or not the run was saved meanwhile.
        known = [loss for number, loss in self._recent if number < step - 1][-_SPIKE_OF:]
        if not self.config.train.spike or len(known) < _SPIKE_FROM or max(known) <= 0:
            return math.inf
        return torch.tensor(self.config.train.spike * max(known)).item()  # as the device has it, a float32

    def _judge(self, at: Position, last: _Launched, loss: float, norm: float, began: float) -> None:
        """Raises Diverged where a step was bad. Neither it nor the one behind it has changed anything: see `Steps.bad`."""
        length, total = len(self.given.sampler), self.config.train.epochs * len(self.given.sampler)
        if last.good(loss, norm):
            return
        if not math.isfinite(loss):
            what, advice = f"the loss is {loss}", "Lower optim.lr, lengthen schedule.warmup_epochs or set optim.clip_norm"
        elif not math.isfinite(norm):
            what, advice = f"the gradient's norm is {norm}", "Lower optim.lr or lengthen schedule.warmup_epochs"
        else:
            what = f"the loss is {loss:.4g}, above the {last.limit:.4g} that train.spike = {self.config.train.spike:g} allows,"
            advice = "Look at its clips; --resume goes on before them, with another train.spike or optim.clip_norm"
        step = at.epoch * length + last.step + 1
        ids = [str(self.given.data.table.id(row)) for row in self._rows(at.epoch, last.step)]
        self.told.log.write("diverged", at.epoch + 1, step=step, loss=loss, grad_norm=norm, clips=ids)
        if self._own > 1:  # a run whose first step is bad has nothing to save
            self._saved(at, began)
        shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more, all in log.jsonl" if len(ids) > 3 else "")
        raise Diverged(
            f"train: {what} at step {step} of {total}, epoch {at.epoch + 1}, lr {last.lr:.2e}. {advice}. Its clips: {shown}"
        )

    def _rows(self, epoch: int, step: int) -> list[int]:
        self.given.sampler.epoch = epoch
        return next(itertools.islice(self.given.sampler, step, None))

    def _tell(self, at: Position, last: _Launched, loss: float, norm: float) -> None:
        told, length = self.told, len(self.given.sampler)
        told.log.write("step", at.epoch + 1, step=at.epoch * length + last.step + 1, loss=loss, lr=last.lr, grad_norm=norm)
        told.meter.step(last.waited)
        words = [f"epoch {at.epoch + 1}", f"step {last.step + 1}/{length}", f"loss {loss:.4g}", f"|g| {norm:.3g}"]
        words.append(told.meter.line())
        told.progress.live("  ".join(filter(None, words)))

    def _now(self, at: Position, began: float, replaced: int | None = None) -> Position:
        replaced = (self.replaced() if replaced is None else replaced) - self._replaced
        seconds = time.perf_counter() - began
        return dataclasses.replace(at, seconds=seconds, replaced=replaced, recent=tuple(loss for _, loss in self._recent))

    def _saved(self, at: Position, began: float, must: bool = False) -> Position:
        self.told.log.sync()
        at = self._now(at, began)
        self.save(at, must)
        return at

    def _rescue(self, at: Position, pending: _Launched | None, began: float) -> None:
        """Saves what was trained before a batch that could not be had or computed. It asks the other processes for nothing, as
        nobody knows what they do."""
        if pending is None or self.steps.updating or not self.steps.ranks.main or self.save.together:
            return
        with contextlib.suppress(
            Exception
        ):  # the device may be what is broken; the error that brought us here is the one to see
            loss, norm = pending.loss(), pending.norm()
            if pending.good(loss, norm):
                self._tell(at, pending, loss, norm)
                self._recent.append((at.epoch * len(self.given.sampler) + pending.step, loss))
                at = dataclasses.replace(at, step=pending.step + 1, loss=at.loss + loss, waited=at.waited + pending.waited)
                self.told.log.sync()
                self.save(self._now(at, began, self.given.data.replaced))
