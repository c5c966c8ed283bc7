"""The pairwise losses over a group, against one process: python pairwise_ranks.py FILE CHECK,... BACKEND...

Four ranks meet in FILE and make groups of 1 to 4 of themselves."""

import copy
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evaat_fast import ops
from evaat_fast.ops.pairwise.check import Options
from evaat_fast.ops.pairwise.contrast import contrast
from evaat_fast.ops.pairwise.reference import Penalty
from evaat_fast.ops.pairwise.sms import max_margin
from evaat_fast.train.ranks import leave

N, E = 24, 7
MARGIN_CASES = (
    "sms",
    "transposed",
    "codes",
    "indexed",
    "indexed codes",
    "verb noun",
    "own",
    "paper",
    "charades",
    "mi_mm",
    "adaptive",
    "panels",
)
CONTRAST_CASES = ("clip", "clip learned", "ego", "ego transposed", "ego ids", "ego classes", "ego panels")
CASES = MARGIN_CASES + CONTRAST_CASES
INTERPRETED = ("codes", "verb noun", "panels", "clip learned", "ego ids")  # an interpreter is slow


def known():
    """What a whole batch's pairs are known by."""
    torch.manual_seed(1)
    iou = torch.randint(0, 5, (6, 6)) / 4
    return {
        "c": torch.randint(0, 11, (N, N)) / 10,
        "table": torch.randint(0, 11, (9, 8)) / 10,
        "rows": torch.randint(0, 9, (N,)),
        "columns": torch.randint(0, 8, (N,)),
        "verb": torch.randint(0, 3, (N,)),
        "noun": torch.randint(0, 6, (N,)),
        "iou": (iou + iou.T) / 2,
        "own": torch.rand(N),
        "positives": torch.rand(N, N) < 0.2,
        "classes": torch.rand(N, 40) < 0.1,
    }


def call(case, k, part, video, text, scale, group=None, grad_mode="ddp", **options):
    """One loss of the pairs of `part` of the batch."""
    of = dict(options, group=group, grad_mode=grad_mode)
    c, positives, index = k["c"][part], k["positives"][part], {x: k[x][part] for x in ("rows", "columns", "verb", "noun")}
    if case.startswith(("clip", "ego")):
        if case == "ego panels":
            return contrast("ego_nce_loss", video, text, 5.0, positives, Options(**of, panel_rows=4))
        if case.startswith("clip"):
            return ops.clip_loss(video, text, scale if case == "clip learned" else 3.0, **of)
        if case == "ego ids":
            positives = ops.VerbNounPositives(index["verb"], index["noun"])
        elif case == "ego classes":
            positives = ops.VerbNounPositives(k["classes"][part], index["noun"].int() - 1)
        elif case == "ego transposed":
            positives = k["positives"].T.contiguous().T[part]
        return ops.ego_nce_loss(video, text, positives, temperature=0.2, **of)
    if case == "panels":
        return max_margin("sms_loss", video, text, c, None, Penalty(0.6, 0.1, 0.05, "code"), Options(**of, panel_rows=4))
    if case == "mi_mm":
        return ops.mi_mm_loss(video, text, **of)
    if case == "adaptive":
        return ops.adaptive_mi_mm_loss(video, text, k["own"][part], **of)
    if case == "own":
        of["self_relevancy"] = k["own"][part].half()
    codes = (k["table"] * 240).to(torch.uint8)
    relevancy = {
        "transposed": lambda: k["c"].T.contiguous().T[part],
        "codes": lambda: ops.DenseRelevancy((c * 240).to(torch.uint8), 1 / 240),
        "indexed": lambda: ops.IndexedRelevancy(k["table"], index["rows"], index["columns"]),
        "indexed codes": lambda: ops.IndexedRelevancy(codes, index["rows"].int(), index["columns"], 1 / 240),
        "verb noun": lambda: ops.VerbNounRelevancy(index["verb"], index["noun"], k["iou"]),
    }.get(case, lambda: c)()
    return ops.sms_loss(video, text, relevancy, rule=case if case in ("paper", "charades") else "code", **of)


def features(dtype):
    torch.manual_seed(0)
    video = torch.randn(N, E, dtype=torch.float64)
    return video.to(dtype), (0.5 * video + torch.randn(N, E, dtype=torch.float64)).to(dtype)


def gradients(case, k, part, group=None, dtype=torch.float64, weight=None, learns=(True, True, True), **options):
    """The loss, or with weights those of each pair, and the gradients asked for of videos, captions and scale."""
    leaves = [x[part].clone().requires_grad_(need) for x, need in zip(features(dtype), learns, strict=False)]
    leaves.append(torch.tensor(3.0, dtype=dtype, requires_grad=learns[2]))
    of = dict(options, reduction="mean" if weight is None else "none")
    loss = call(case, k, part, *leaves, group=group, **of)
    total = loss if weight is None else (loss * weight[part].to(loss.dtype)).sum()
    found = torch.autograd.grad(total, [x for x in leaves if x.requires_grad], allow_unused=True) if any(learns) else ()
    grads = iter(found)
    return loss.detach(), [next(grads) if need else None for need in learns]


def near(a, b, bound):
    if not (a.double() - b.double()).norm() <= bound * b.double().norm():
        raise AssertionError(f"{a} is not {b}")


def losses(rank, groups, backends):
    """Every label source on every number of ranks."""
    k, weight = known(), torch.randn(N, generator=torch.Generator().manual_seed(3))
    whole = slice(None)
    for backend, dtype in ((b, d) for b in backends for d in (torch.float64, torch.float32)):
        if (backend, dtype) == ("triton", torch.float64):
            continue
        bound, how = 1e-12 if dtype == torch.float64 else 5e-6, {"backend": backend, "dtype": dtype}
        some = INTERPRETED if backend == "triton" else CASES
        for case, each in ((case, each) for case in some for each in (None, weight)):
            want, of_all = gradients(case, k, whole, weight=each, **how)
            for W, group in groups.items():
                if dtype == torch.float32 and backend != "triton" and each is not None and W != 3:
                    continue
                part, mean = slice(rank * N // W, (rank + 1) * N // W), W != 3
                options = {"group": group, "grad_mode": "ddp" if mean else "sum", **how}
                loss, (video, text, scale) = gradients(case, k, part, weight=each, **options)
                near(loss, want if each is None else want[part], bound)
                if each is None and W > 1:
                    all_of = [torch.empty_like(loss) for _ in range(W)]
                    dist.all_gather(all_of, loss, group=group)
                    assert all(torch.equal(x, loss) for x in all_of)
                factor = W if mean else 1
                near(video, factor * of_all[0][part], bound)
                near(text, factor * of_all[1][part], bound)
                if case == "clip learned":  # all ranks share it
                    near(scale, of_all[2] / (1 if mean else W), bound)
                if W == 2:
                    for learns in ((False, False, False), (True, False, False), (False, True, False)):
                        again, partly = gradients(case, k, part, weight=each, learns=learns, **options)
                        near(again, loss, bound)
                        for a, b in zip(partly, (video, text, scale), strict=True):
                            assert a is None or torch.equal(a, b) or near(a, b, bound) is None


class Embed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.video, self.text = torch.nn.Linear(E, 5), torch.nn.Linear(E, 5)
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, video, text):
        return self.video(video), self.text(text) * self.scale[0].exp(), self.scale[1].exp()


def wrapped(rank, groups, backends):
    """Under DDP and FSDP, which average, and without them, added up by hand."""
    k, (video, text) = known(), features(torch.float64)
    part = slice(rank * N // 4, (rank + 1) * N // 4)
    for backend, case in ((b, c) for b in backends for c in ("sms", "clip learned", "ego ids")):
        alone = Embed().double()
        for x in alone.parameters():
            dist.broadcast(x.detach(), 0)
        ddp, sharded, plain = (copy.deepcopy(alone) for _ in range(3))
        ddp, sharded = DistributedDataParallel(ddp), fully_shard(sharded, mesh=init_device_mesh("cpu", (4,)))
        call(case, k, slice(None), *alone(video, text), backend=backend).backward()
        for model, mode in ((ddp, "ddp"), (sharded, "ddp"), (plain, "sum")):
            loss = call(case, k, part, *model(video[part], text[part]), group=groups[4], grad_mode=mode, backend=backend)
            loss.backward()
            for a, b in zip(model.parameters(), alone.parameters(), strict=True):
                if mode == "sum":
                    dist.all_reduce(a.grad)
                ours = a.grad.full_tensor() if model is sharded else a.grad
                torch.testing.assert_close(ours, b.grad, rtol=1e-11, atol=1e-15)


def refusals(rank, groups, backends):
    """One error on every rank, and a group that works after it."""
    k, group, odd, part = known(), groups[4], rank == 2, slice(rank * N // 4, (rank + 1) * N // 4)
    c, index = k["c"][part], [k[x][part].clone() for x in ("rows", "columns", "verb", "noun")]

    def sms(n=6, width=E, dtype=torch.float32, relevancy=None, learns=True, **options):
        video, text = (x[part][:n, :width].to(dtype) for x in features(torch.float64))
        relevancy = c[:n] if relevancy is None else relevancy
        return ops.sms_loss(video.requires_grad_(learns), text, relevancy, group=group, **options)

    outside = index[0].clone()
    outside[3] += 9 * odd
    table = ops.IndexedRelevancy(k["table"], outside, index[1])
    for options, message in (
        (
            {"n": 5 if odd else 6},
            r"video of one dtype and shape on every rank, got float32 [6, 7] on rank 0 and float32 [5, 7] on rank 2",
        ),
        ({"width": 3 if odd else E}, "video of one dtype and shape on every rank"),
        ({"dtype": torch.float16 if odd else torch.float32}, "video of one dtype and shape on every rank"),
        ({"reduction": "none" if odd else "mean"}, "the same reduction on every rank, got mean on rank 0 and none on rank 2"),
        ({"grad_mode": "sum" if odd else "ddp"}, "the same grad_mode on every rank"),
        ({"margin": 0.5 if odd else 0.6}, "the same penalty on every rank"),
        ({"rule": "paper" if odd else "code"}, "the same penalty on every rank"),
        ({"backend": "reference" if odd else "cpu"}, "the same backend on every rank"),
        ({"learns": not odd}, "the same gradients on every rank"),
        ({"self_relevancy": k["own"][part] if odd else None}, "the same self_relevancy on every rank"),
        ({"relevancy": ops.VerbNounRelevancy(*index[2:], k["iou"]) if odd else None}, "the same relevancy on every rank"),
        ({"relevancy": table, "backend": "cpu"}, "rank 2 cannot take part: IndexError: video_index: expected 0 <= index < 9"),
        ({"relevancy": k["c"]}, "relevancy: expected the shape [6, 24], got [24, 24]"),
    ):
        try:
            sms(**options)
        except (ValueError, IndexError) as error:
            own = type(error) is IndexError
            said = f"group: rank 2 cannot take part: IndexError: {error}" if own else str(error)
            assert message in said and own <= odd, (message, said)
        else:
            raise AssertionError(f"no error: {message}")
        assert torch.isfinite(sms())
    for wrong in (object(), dist.GroupMember.NON_GROUP_MEMBER):
        try:
            ops.clip_loss(*features(torch.float32), 1.0, group=wrong)
        except TypeError as error:
            assert "group: expected a torch.distributed.ProcessGroup that this process is in, got" in str(error)
    none = torch.zeros(0, E, requires_grad=True)
    assert ops.clip_loss(none, none, 1.0, group=group) == 0
    try:
        torch.compile(lambda x: ops.clip_loss(x, x, 1.0, group=group), backend="eager", fullgraph=True)(none)
        raise AssertionError("compiled")
    except Exception as error:
        assert "leave them out of what torch.compile sees" in str(error), error
    loss = torch.compile(lambda x: 2 * ops.clip_loss(x, 3 * x, 1.0, group=group), backend="eager")(c)  # in between graphs
    assert torch.equal(loss, 2 * ops.clip_loss(c, 3 * c, 1.0, group=group))


class Travelled(TorchDispatchMode):
    """Bytes of every collective, by its kind, as the whole of what is gathered, scattered or reduced."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = function.name().removeprefix("c10d::")
            whole = args[0][0] if isinstance(args[0], list) else max(args[:2], key=torch.Tensor.numel)
            self.bytes[kind] = self.bytes.get(kind, 0) + whole.nbytes
        return function(*args, **(kwargs or {}))


def costs(rank, groups, backends):
    """The bytes that evaat_fast/ops/pairwise/ranks.py states, and the multiplications."""
    k, triton = known(), backends == ["triton"]
    dtype, backend, b = (torch.float32, "triton", 4) if triton else (torch.float64, "cpu", 8)
    one, both = ("loss", True), (("loss", True), ("loss", False))
    for W, group in groups.items():
        part, n = slice(rank * N // W, (rank + 1) * N // W), N // W
        kinds = {"sms": (0, (*both, ("each", True))), "indexed": (16 * N, (one,)), "verb noun": (24 * N, (one,))}
        kinds |= {"clip": (0, both), "ego": (0, both), "ego ids": (16 * N, (one,))}
        for case, what, learns, labels in ((c, *how, labels) for c, (labels, ways) in kinds.items() for how in ways):
            weight = torch.ones(N) if what == "each" else None
            with Travelled() as travelled, FlopCounterMode(display=False) as flops:
                options = {"dtype": dtype, "backend": backend, "weight": weight, "learns": (learns,) * 3}
                gradients(case, k, part, group=group, **options)
            captions, contrastive = N * E * b, case.startswith(("clip", "ego"))
            vectors = {"clip": triton, "ego": 2 if triton else 3}.get(case.split()[0], 3) * N * b
            step = captions + vectors + (captions if triton and learns and case != "clip" else 0)
            gather = 1024 * W + labels + step + (16 if contrastive or triton else 8) * W + (0 if contrastive else N * b)
            want = {"_allgather_base_": gather}
            if learns:
                want["_reduce_scatter_base_"] = captions + (0 if contrastive else 4 * N)
            if contrastive:
                want["allreduce_"] = 2 * 8 * N * (1 if case == "clip" else 2)
            if what == "each":  # a step forward, without gradients, and one back, with what each pair counts
                want = {"_allgather_base_": gather + captions + vectors + N * b, "_reduce_scatter_base_": captions + 12 * N}
            assert travelled.bytes == (want if W > 1 else {}), (case, W, learns, what, travelled.bytes, want)
            if W > 1 and not triton:  # one panel holds all products
                products = (6 if learns else 2) + (2 if what == "each" else 0)
                assert flops.get_total_flops() == products * n * N * E, (case, W, learns, flops.get_flop_counts())


def main(rank, path, checks, backends):
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's in Triton's interpreter, of log(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=4)
    groups = {W: dist.new_group(range(W)) for W in (2, 3, 4)}
    groups[1] = dist.new_group([rank], use_local_synchronization=True)
    some = (2,) if backends == ["triton"] else (1, 2, 3, 4)
    mine = {W: groups[W] for W in some if rank < W}
    for check in checks.split(","):
        globals()[check](rank, mine, backends)
    print("rank", rank, "agrees", flush=True)
    dist.barrier()
    leave()


if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1], sys.argv[2], sys.argv[3:]), 4)
