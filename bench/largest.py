"""The largest batch that a stack trains on a GPU, a multiple of STEP: guessed from the memory of two batches, then tried."""

import gc
import math
import sys
from dataclasses import dataclass

import torch

STEP, MOST, TRIES = 8, 8192, 10
SPARE = 0.97  # of the memory is what the guess reckons with, as some is lost between blocks; the tries tell how much
KEPT = 2**30  # bytes that a try may leave behind: workspaces of cuBLAS and cuDNN


@dataclass(frozen=True)
class Bracket:
    """fits: the largest batch known to train, 0 if none; fails: the smallest known not to, None if none was found."""

    fits: int
    fails: int | None


def bracket(fits, guess, low=0, high=None, most=MOST, tries=TRIES, goes_on=lambda: True):
    """Tries batches until two neighbours are known of which one trains, or until it may not go on. A right guess takes two
    tries; from a wrong one the distance doubles until it was too far, and then what is left is halved.

    Args:
        fits: batch -> whether it trains: true up to some batch, and false beyond.
        low, high: a batch known to train (or 0), and one known not to (or None).
        most: no larger batch is tried. tries: at most so many. goes_on: asked before each of them.
    """
    gap, batch, above, below = STEP, int(guess), False, high is not None
    for _ in range(tries):
        batch = max(low + STEP, min(batch, most if high is None else high - STEP)) // STEP * STEP
        if not low < batch <= most or (high is not None and batch >= high) or not goes_on():
            break
        if fits(batch):
            low, above = batch, True
        else:
            high, below = batch, True
        batch = (low + high) // 2 if above and below else low + gap if above else high - gap
        gap *= 2
    return Bracket(low, high)


def predicted(peaks, limit):
    """The batch whose peak would be the limit, of {batch: bytes at the peak} of two batches."""
    (a, at_a), (b, at_b) = sorted(peaks.items())
    return b + (limit - at_b) / max((at_b - at_a) / (b - a), 1.0)


def reason(error):
    """Why a batch did not train. The end of a capture may hide the error that ended it, so all of the chain are asked."""
    texts, seen = [], error
    while seen is not None:
        texts.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    memory = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
    return "out of memory" if any(word in text for text in texts for word in memory) else texts[0][:200]


def attempt(trains, batch):
    """None, or why trains(batch) failed: in words, as the error's frames would hold the batch's tensors."""
    try:
        trains(batch)
    except Exception as error:
        return reason(error)
    return None


class Gpu:
    """The memory that torch manages on the GPU; a test has another."""

    def reset(self):
        torch.cuda.reset_peak_memory_stats()

    def peak(self):
        """Bytes since the reset."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def limit(self):
        """Bytes that torch may hold."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    def release(self):
        """Frees what a try left, and returns the bytes that torch still holds. Raises what a broken device raises."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # each batch is compiled anew, and after eight of them Dynamo would run the next eagerly
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


def search(training, batch, goes_on, memory=None):
    """What a record keeps: {"B": the largest batch, "tries": how many it took, "fails": the next that was found not to train,
    "why": it did not}; "stopped" if memory was not freed, and what follows could not be trusted.

    training: has step(), resize(batch) and drop(), which lets go of what is in the way of another batch.
    """
    memory = memory or Gpu()
    why, peaks, stopped = {}, {}, {}

    def trains(batch):
        memory.reset()
        training.resize(batch)
        for _ in range(2):
            training.step()
        peaks[batch] = memory.peak()

    def fits(batch):
        why[batch] = attempt(trains, batch)
        training.drop()
        left = memory.release() - held
        if left > KEPT:
            stopped["stopped"] = f"a try with {batch} clips left {left / 2**30:.1f} GiB behind"
        return why[batch] is None

    held = math.inf  # of the first try, which makes the optimiser's state
    may = lambda: not stopped and goes_on()  # noqa: E731
    if not fits(STEP):  # the smallest first: that state must not be left half made for lack of memory
        found = Bracket(0, STEP)
    else:
        held = memory.release()
        second = max(batch, 2 * STEP)
        if fits(second):
            found = bracket(fits, predicted(peaks, SPARE * memory.limit()), low=second, goes_on=may)
        else:
            found = bracket(fits, second // 2, low=STEP, high=second, goes_on=may)
    failed = {"fails": found.fails, "why": why[found.fails]} if found.fails else {}
    return {"B": found.fits, "tries": len(why), **failed, **stopped}
