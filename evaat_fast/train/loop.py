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
from evaat_fast.train.ranks import OtherFailed, Ranks, Wishes, announce, brief, meet_again
from evaat_fast.train.sampler import EpochSampler
from evaat_fast.train.schedules import warmup
from evaat_fast.train.steps import Steps, later
from evaat_fast.train.stop import Signals, Stopped

SAVE, STOP, FAIL = 1, 2, 3  # what a process wishes after a step; the last, because it has no batch for the next one
_REST_SECONDS = 10.0  # that a GPU may need for the step that it has begun
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
class _Given:
    """A batch, and the seconds that it was waited for, or the error that came in its place."""

    batch: Mapping[str, Tensor]
    waited: float
    error: Exception | None = None


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
        self._at, self._began = Position(), 0.0
        self._flying: deque[_Launched] = deque()  # launched, and not counted in _at: one, and for a moment the next
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPIKE_OF + 2)  # (step of the run, its loss)
        # Clips of all processes that could not be read when the epoch began; of this one before it read a batch ahead.
        self._replaced, self._read = 0, 0
        self._ended = False  # nothing is left to save, or it was tried
        self.heard = 0  # what a process wished in the last step of an epoch: 0, SAVE or STOP

    def epoch(self, at: Position, rng: Mapping[str, Any] | None = None) -> Position:
        """Trains one epoch, or what is left of it.

        Args:
            at: where the run stands. rng: of the checkpoint that it goes on from in the midst of an epoch.

        Returns:
            Where it stands after the last step, which is still of this epoch. `heard` says whether it should be saved or end.

        Raises:
            Diverged: a step was bad; Stopped: a signal came; OtherFailed: another process has no batch. Those, and what else a
            batch raises, when what was trained before it is saved, if it can be.
        """
        try:
            return self._epoch(at, rng)
        except (Diverged, Stopped, OtherFailed):  # saved
            raise
        except Exception as error:
            if not self._ended:
                self._rescue(error)
            raise

    def _epoch(self, at: Position, rng: Mapping[str, Any] | None) -> Position:
        steps, config, sampler, first = self.steps, self.config, self.given.sampler, at.step
        steps.model.train()
        self.given.data.set_epoch(at.epoch)
        sampler.epoch = at.epoch
        if not self._recent:
            self._recent.extend(enumerate(at.recent, at.epoch * len(sampler) + first - len(at.recent)))
        self._at, self._read = at, self.given.data.replaced
        self._replaced = sum(steps.ranks.gather(self._read)) - at.replaced
        self._began = time.perf_counter() - at.seconds
        batches = self._batches(first)
        if rng is not None:  # after the loader has drawn from it
            checkpoint.restore_rng(rng)
        given = next(batches)
        self._wishes.say(FAIL if given.error else 0)
        if self._wishes.hear():
            self._fail(given.error)
        for step in range(first, len(sampler)):
            lr, limit = self._rate(at.epoch, step), self._limit(at.epoch * len(sampler) + step)
            steps.set_lr(lr)
            if config.train.spike:
                steps.set_limit(limit)
            batch, loss = given.batch, later(steps(given.batch))
            self._flying.append(_Launched(step, lr, limit, given.waited, loss, later(steps.norm)))
            self._own += 1
            if self._own == 1:
                self.told.meter.know(steps.model, batch["text"].shape[1], config.model.patch_dropout)
            # While the device computes: the next batch, what all processes wish, and the loss of the step before, so that the
            # device never waits for the log.
            self._read = self.given.data.replaced
            given = next(batches) if step + 1 < len(sampler) else given
            wish = STOP if self.signals.heard else SAVE if self.save.due(self._own) else 0
            self._wishes.say(FAIL if given.error else wish)
            self._settle(1)
            heard = self._wishes.hear()
            if step + 1 == len(sampler):
                self.heard = heard
            elif heard:
                self._settle()
                if heard == FAIL:
                    self._fail(given.error)
                self._saved(must=heard == STOP)
                if heard == STOP:
                    self.stop(self._at)
        self._settle()
        assert self._at.step == len(sampler) > first
        self._at = self._now()
        return self._at

    def _settle(self, flying: int = 0) -> None:
        """Reads the losses of the steps that were launched, but for so many of the last."""
        while len(self._flying) > flying:
            last, at = self._flying[0], self._at
            loss, norm = last.loss(), last.norm()
            self._judge(last, loss, norm)
            self._flying.popleft()
            self._count(last, loss)
            self._tell(at, last, loss, norm)

    def _count(self, last: _Launched, loss: float) -> None:
        """A step is done, and was good."""
        at = self._at
        self._recent.append((at.epoch * len(self.given.sampler) + last.step, loss))
        self._at = dataclasses.replace(at, step=last.step + 1, loss=at.loss + loss, waited=at.waited + last.waited)

    def _fail(self, error: Exception | None) -> None:
        """Ends the run, as a process has no batch: this one, whose error that is, or another. All know, and save together."""
        if self._own:  # a run that has done nothing has nothing to save
            self._saved()
        said = self.steps.ranks.gather(brief(error) if error else "")
        self._ended = True
        if error:
            raise error
        failed = next(rank for rank, text in enumerate(said) if text)
        raise OtherFailed(f"process {failed} failed: {said[failed]}")

    def stop(self, at: Position) -> None:
        """Raises Stopped, for a signal that this process or another one has heard."""
        number = max(self.steps.ranks.gather(self.signals.heard))
        self.signals.heard = self.signals.heard or number
        where = f"epoch {at.epoch + 1}, after step {at.step} of {len(self.given.sampler)}" if at.step else f"epoch {at.epoch}"
        text = f"stopped by {self.signals.name} in {where}, which is saved" if self.steps.ranks.main else ""
        raise Stopped(text, number)

    def _batches(self, first: int) -> Iterator[_Given]:
        """Batches from one of them on. The loader has begun when this returns."""
        config, given = self.config, self.given
        loaded = iter(
            inputs.loader(config, given.data, given.sampler, given.tokenize, self.steps.device, self.steps.ranks, first)
        )

        def timed():
            while True:
                begin = time.perf_counter()
                try:
                    batch = next(loaded)
                except Exception as error:
                    yield _Given({}, 0.0, error)
                    return
                yield _Given(batch, time.perf_counter() - begin)

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

    def _judge(self, last: _Launched, loss: float, norm: float) -> None:
        """Raises Diverged where a step was bad. Neither it nor the one behind it has changed anything: see `Steps.bad`."""
        at = self._at
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
        if self._own > len(self._flying):  # a run whose first step is bad has nothing to save
            self._saved()
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

    def _now(self) -> Position:
        replaced = sum(self.steps.ranks.gather(self._read)) - self._replaced
        return self._with(replaced)

    def _with(self, replaced: int) -> Position:
        seconds = time.perf_counter() - self._began
        return dataclasses.replace(self._at, seconds=seconds, replaced=replaced, recent=tuple(x for _, x in self._recent))

    def _saved(self, must: bool = False) -> None:
        self._at = self._now()
        try:
            self.save(self._at, must)
        except OSError:
            self._ended = True
            raise

    def _rescue(self, error: Exception) -> None:
        """Saves what was trained before a step that raised, here or in another process.

        Where each process holds all weights the first one saves its own. Where they are shared out all have to be there: none
        may have gone on, or be in the midst of an update. Where they are not, the last checkpoint stands.
        """
        ranks, steps = self.steps.ranks, self.steps
        if ranks.several:
            announce(ranks, error)
        # The device may be what is broken, and the error that brought us here is the one to see.
        with contextlib.suppress(Exception):
            kept = not steps.updating and steps.count == self._own > 0
            if self.save.shared:  # which also ends what a GPU waits for
                state = [self._at.epoch, self._at.step + len(self._flying)] if kept else None
                found = meet_again(ranks, state, lambda: self.signals.heard)
            else:
                found = Ranks() if kept and ranks.main and self._at_rest() else None
            if found is None:
                return
            for last in self._flying:
                loss, norm = last.loss(), last.norm()
                kept = kept and last.good(loss, norm)
                if kept:
                    before = self._at
                    self._count(last, loss)
                    self._tell(before, last, loss, norm)
            if all(found.gather(kept)):
                # How many clips the others could not read, nobody knows any more.
                self.save(self._with(max(self._at.replaced, self._read - self._replaced)), ranks=found)
                found.gather(None)  # nobody ends the others' part of it

    def _at_rest(self) -> bool:
        """Whether the device has done what it was given, and does not wait for another process."""
        if self.steps.device.type != "cuda":
            return True
        given, end = torch.cuda.Event(), time.monotonic() + _REST_SECONDS
        given.record(torch.cuda.current_stream(self.steps.device))
        while not given.query() and time.monotonic() < end:
            time.sleep(0.01)
        return given.query()
