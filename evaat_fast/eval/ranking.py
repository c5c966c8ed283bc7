"""Ranks every candidate of every query, a tile of queries at a time, and sums what `mir` needs of them.

On a CPU a row is sorted once, as int64 keys that hold the similarity above and the column below: NumPy sorts those in
vector registers (with AVX-512 three times as fast as it finds an order, sixteen times as fast as a stable one), and equal
similarities come out first to last. What follows looks only at relevancies above 0, a ninth of EK-100's.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CPU_TILE = 1 << 17  # elements: 1 MiB of keys, what a core's second cache holds
_GPU_TILE = 1 << 21  # 16 MiB of indices

__all__ = ["Ranked", "rank"]


@dataclass(frozen=True)
class Ranked:
    """Of every query, [Q] each: sums of precisions at hits, gain down to the number of relevant candidates, the best
    such gain (float64); hits and relevant candidates (int64), and whether all candidates are as relevant (bool)."""

    precision: Tensor
    gain: Tensor
    best: Tensor
    hits: Tensor
    relevant: Tensor
    constant: Tensor


def rank(sim: Tensor, relevancy: Tensor) -> Ranked:
    """The sums of every row of sim [Q, C] under relevancy [Q, C] (float32 or float64, 0..1), any strides, on one device.

    Equal similarities count first to last for the precisions and last to first for the gain.
    """
    if sim.device.type == "cuda":
        return Ranked(*map(torch.cat, zip(*_gpu_tiles(sim, relevancy), strict=True)))
    sim, labels = sim.cpu(), relevancy.cpu().numpy()
    rows, columns = sim.shape
    scores = _array(sim)
    discounts = 1 / np.log2(np.arange(2.0, columns + 2))
    step = max(1, _CPU_TILE // columns)

    def tile(first):
        some = slice(first, first + step)
        return _cpu_tile(_floats(scores[some]), labels[some], discounts)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(tile, range(0, rows, step)))
    return Ranked(*(torch.from_numpy(np.concatenate(some)).to(relevancy.device) for some in zip(*parts, strict=True)))


def _array(sim):
    """A NumPy view of the tensor: of bfloat16, which NumPy lacks, as the upper halves of float32; rarer types are float32."""
    if sim.dtype == torch.bfloat16:
        return sim.view(torch.int16).numpy().view(np.uint16)
    return (sim if sim.dtype in (torch.float16, torch.float32, torch.float64) else sim.float()).numpy()


def _floats(tile):
    if tile.dtype == np.uint16:
        return np.left_shift(tile, 16, dtype=np.uint32).view(np.float32)
    return tile.astype(np.float32) if tile.dtype == np.float16 else tile


def _cpu_tile(sim, relevancy, discounts):
    rows, columns = sim.shape
    row = np.arange(rows)
    order, tied = _order(sim)
    ranked = np.ascontiguousarray(relevancy).reshape(-1).take(order)
    at, values = _relevant(ranked)
    relevant = np.bincount(at // columns, minlength=rows)
    of = np.repeat(row, relevant)
    place = np.arange(len(at)) - np.repeat(relevant.cumsum() - relevant, relevant)  # among the relevant ones of its row
    packed = np.zeros((rows, relevant.max(initial=0)))
    packed[of, place] = values
    hit = np.flatnonzero(values == 1)
    running = packed.cumsum(1)[of[hit], place[hit]]
    precision = np.bincount(of[hit], running / (at[hit] - of[hit] * columns + 1), rows)
    hits = np.bincount(of[hit], minlength=rows)
    packed.sort(axis=1)
    best = packed[:, ::-1] @ discounts[: packed.shape[1]]
    if _reverse_ties(ranked, tied, columns, relevant):
        at, values = _relevant(ranked)
        of = at // columns
    place = at - of * columns
    shown = np.flatnonzero(place < relevant[of])
    gain = np.bincount(of[shown], values[shown] * discounts[place[shown]], rows)
    constant = relevant == 0
    if (relevant == columns).any():
        constant |= (relevant == columns) & (packed[:, 0] == packed[:, -1])
    return precision, gain, best, hits, relevant, constant


def _relevant(ranked):
    """Where the flat array is above 0, and its values there in float64."""
    at = np.flatnonzero(ranked != 0)
    return at, ranked[at].astype(np.float64)


def _order(sim):
    """(flat indices of each row's elements from the highest, equal ones first to last; where the next one is equal)."""
    rows, columns = sim.shape
    low = (1 << (columns - 1).bit_length()) - 1
    key = np.subtract(0.0, sim, out=np.empty(sim.shape), dtype=np.float64).view(np.int64)  # 0 - x: no -0 among them
    key ^= (key >> 63) & np.iinfo(np.int64).max  # integers in the floats' order
    key &= ~low
    key |= np.arange(columns)
    key.sort(axis=1)
    start = np.arange(rows)[:, None] * columns
    tied = np.zeros(sim.shape, dtype=bool)
    if sim.dtype == np.float32 and low < 1 << 29:  # the columns displaced nothing
        np.less_equal((key[:, 1:] ^ key[:, :-1]).view(np.uint64), low, out=tied[:, :-1])  # unsigned: signs differ once
        key &= low
        key += start
        return key.reshape(-1), tied.reshape(-1)
    key &= low
    key += start
    sim = np.ascontiguousarray(sim)
    values = sim.reshape(-1).take(key)
    for row in np.flatnonzero((values[:, 1:] > values[:, :-1]).any(1)):  # differ where the columns lay
        order = (0.0 - sim[row]).argsort(kind="stable")
        key[row], values[row] = order + start[row], sim[row, order]
    np.equal(values[:, 1:], values[:, :-1], out=tied[:, :-1])
    return key.reshape(-1), tied.reshape(-1)


def _reverse_ties(ranked, tied, columns, relevant):
    """Reverses the runs of ties in the flat array that begin among a row's first `relevant`; whether that changed it."""
    at = np.flatnonzero(tied)
    if not len(at):
        return False
    first = np.concatenate(([True], np.diff(at) != 1))
    starts, ends = at[first], at[np.concatenate((first[1:], [True]))] + 1
    row = starts // columns
    shown = starts - row * columns < relevant[row]
    starts, ends = starts[shown], ends[shown]
    sizes = ends - starts + 1
    place = np.arange(sizes.sum()) + np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    old, new = ranked[place], ranked[np.repeat(starts + ends, sizes) - place]
    if np.array_equal(old, new):
        return False
    ranked[place] = new
    return True


def _gpu_tiles(sim, relevancy):
    rows, columns = sim.shape
    ranks = torch.arange(1, columns + 1, dtype=torch.float64, device=sim.device)
    discounts = 1 / (ranks + 1).log2()
    for some in torch.arange(rows, device="cpu").split(max(1, _GPU_TILE // columns)):
        tile = slice(int(some[0]), int(some[-1]) + 1)
        scores, truth = sim[tile].contiguous(), relevancy[tile].contiguous()
        values, order = scores.sort(dim=1, descending=True, stable=True)
        ranked = truth.gather(1, order).double()
        hit = ranked == 1
        precision = (ranked.cumsum(1) / ranks * hit).sum(1)
        if (values[:, 1:] == values[:, :-1]).any():
            order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
            ranked = truth.flip(1).gather(1, order).double()
        relevant = (truth > 0).sum(1)
        gain = (ranked * (ranks <= relevant[:, None])) @ discounts
        best = truth.sort(dim=1, descending=True).values.double() @ discounts
        low, high = truth.aminmax(dim=1)
        yield precision, gain, best, hit.sum(1), relevant, low == high
