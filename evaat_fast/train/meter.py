"""How fast a run is, for the line that people watch: clips a second, what waits for data, the share of the peak, memory."""

import math
import sys
import time
from collections import deque

import torch

from evaat_fast.model import EVA02AT

_STEPS = 20  # that rates are of


def flop(model: EVA02AT, length: int, dropped: float = 0.0) -> float:
    """Of the matrix products of training on one pair, 3 times those of the forward pass: 6 for each number of a matrix and
    token, 12 N^2 C of attention in each layer, half of it where it is causal.

    Args:
        model: an EVA02AT. length: of the caption, in tokens. dropped: the share of patches that are not shown.
    """
    config, blocks = model.config, (model.visual.blocks, model.text.transformer.resblocks)
    matrices = [sum(p.numel() for p in tower.parameters() if p.ndim >= 2) for tower in blocks]
    patches = max(1, int(math.prod(config.grid) * (1 - dropped)))
    vision = (1 + patches) * matrices[0] + config.vision_layers * 2 * (1 + patches) ** 2 * config.vision_width
    vision += patches * model.visual.patch_embed.proj.weight.numel()
    text = length * matrices[1] + config.text_layers * length**2 * config.text_width
    return 6.0 * (vision + text)


def matmul_peak(device: torch.device, size: int = 8192) -> float | None:
    """FLOP per second of a large bfloat16 product, measured in some 0.1 s on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    own = torch.Generator(device).manual_seed(0)  # a run's own draws stay what they are
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=own) for _ in range(2))
    best = float("inf")
    for _ in range(4):  # the first warms up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            a @ b
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 4e3)
    del a, b
    torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most: on a GPU of tensors, on a CPU of everything, clips that are kept included; None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource  # of Unix alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
    """Rates of the last steps.

    Args:
        clips: of a step, of all processes. device: of this one. peak: of all devices together, FLOP per second; None where it
            is not known, and then MFU is left out.
    """

    def __init__(self, clips: int, device: torch.device, peak: float | None = None) -> None:
        self._clips, self._device, self._work, self._peak = clips, device, 0.0, peak
        self._steps: deque[tuple[float, float]] = deque(maxlen=_STEPS + 1)  # when it ended, what it had waited

    def know(self, model: EVA02AT, length: int, dropped: float = 0.0) -> None:
        """What a clip costs: see `flop`."""
        self._work = flop(model, length, dropped)

    def step(self, waited: float) -> None:
        """A step was launched, after so many seconds that this process waited for its data."""
        self._steps.append((time.perf_counter(), waited))

    def pause(self) -> None:
        """What comes next, an evaluation say, is no step."""
        self._steps.clear()

    @property
    def clips_per_second(self) -> float | None:
        """None until two steps are known."""
        if len(self._steps) < 2:
            return None
        return self._clips * (len(self._steps) - 1) / max(self._steps[-1][0] - self._steps[0][0], 1e-9)

    def line(self) -> str:
        """What is known, in words."""
        if (rate := self.clips_per_second) is None:
            return ""
        span = max(self._steps[-1][0] - self._steps[0][0], 1e-9)
        waited = sum(w for _, w in list(self._steps)[1:])
        text = f"{rate:.4g} clips/s  data {waited / span:.0%}"
        if self._peak and self._work:
            text += f"  MFU {rate * self._work / self._peak:.1%}"
        if held := peak_memory(self._device):
            text += f"  {held / 2**30:.1f} GiB"
        return text
