"""Where labels come from: every source gives the same bits, indices are checked, and every bad argument is named."""

from fractions import Fraction

import pairwise_oracle as oracle
import pytest
import torch
from pairwise_oracle import gradients
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from evaat_fast import ops

N = 50
# 0.5 [same verb] + 0.5 IoU of noun sets with a union of up to seven: a superset of EK-100's 29 relevancies, with 1/14 and 5/6.
IOUS = sorted({Fraction(a, b) for b in range(1, 8) for a in range(b + 1)})
EK100 = sorted({(verb + iou) / 2 for verb in (0, 1) for iou in IOUS})


def results(relevancy, video, text, backend=None, **options):
    return gradients(lambda v, t: ops.sms_loss(v, t, relevancy, backend=backend, **options), video, text)


def sources(values, stored):
    """The matrix values[N, N] from every source that can hold it in `stored`."""
    x = values.to(stored)
    wide = torch.zeros(N, 2 * N, dtype=stored)
    wide[:, ::2] = x
    rows, columns = torch.randperm(N + 7)[:N], torch.randperm(N + 3)[:N]
    table = torch.full((N + 7, N + 3), 99.0, dtype=stored)
    table[rows[:, None], columns] = x
    identity = torch.arange(N)
    return {
        "dense": x,
        "transposed": x.T.contiguous().T,
        "strided": wide[:, ::2],
        "indexed": ops.IndexedRelevancy(table, rows, columns),
        "indexed, int32": ops.IndexedRelevancy(table, rows.int(), columns.int()),
        "indexed, strided table": ops.IndexedRelevancy(table.T.contiguous().T, rows, columns.repeat_interleave(2)[::2]),
        "indexed, identity": ops.IndexedRelevancy(x, identity, identity),
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equal_values_give_equal_bits(features, stored):
    values = torch.randint(0, 9, (N, N)) / 8
    video, text = torch.randn(N, 16).to(features), torch.randn(N, 16).to(features)
    want = results(values, video, text)
    every = {**sources(values, stored), "codes": ops.DenseRelevancy((values * 8).to(torch.uint8), 1 / 8)}
    for name, source in every.items():
        ours = results(source, video, text)
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True)), name
    low = results(values, video, text, "reference")
    for name, source in every.items():
        ours = results(source, video, text, "reference")
        assert all(torch.equal(a, b) for a, b in zip(ours, low, strict=True)), f"{name}, reference"


@pytest.mark.parametrize("stored", [torch.float32, torch.float64], ids=str)
def test_labels_are_rounded_to_float32_before_they_are_compared(stored):
    """Thirds are not exact in either dtype; float32 and float64 tables must still agree on float32 features."""
    values = torch.tensor([float(EK100[i]) for i in torch.randint(0, len(EK100), (N * N,))], dtype=torch.float64).view(N, N)
    video, text = torch.randn(N, 16), torch.randn(N, 16)
    want = results(values.float(), video, text)
    for name, source in sources(values, stored).items():
        assert all(torch.equal(a, b) for a, b in zip(results(source, video, text), want, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_ek100_relevancies_are_told_apart(quantised, dtype):
    """With identical embeddings m = margin * d, so the loss counts every pair of unequal labels, and no pair of equal ones."""
    n = len(EK100)
    assert Fraction(5, 6) in EK100 and Fraction(1, 14) in EK100 and n >= 29
    values = torch.tensor([float(x) for x in EK100], dtype=torch.float64)
    # Column j of every row holds value j, so that each own label w_i = value i meets each other label.
    c = values[None, :].expand(n, n).contiguous()
    w = values
    if quantised:  # as the authors store them: truncated 240ths, 5/6 -> 199, against exact own labels
        c = ops.DenseRelevancy((c * 240).to(torch.uint8), 1 / 240)
    features = torch.ones(n, 4, dtype=dtype)
    # 0.6 * 1/240 is the largest margin that truncation can leave between equal labels.
    ours = ops.sms_loss(features, features, c, self_relevancy=w, relaxation=0.6 / 240 + 1e-6).double()
    total = 0.0
    codes = [Fraction(int(float(x) * 240), 240) if quantised else x for x in EK100]
    for i in range(n):
        for j in range(n):
            for anchor in (i, j) if i != j else ():  # pair (video j, caption i) has the label of column i
                if EK100[anchor] != EK100[i]:
                    total += abs(0.6 * float(EK100[anchor] - codes[i]))
    assert abs(ours - total / (2 * n * (n - 1))) < 1e-6


def test_codes_at_every_level():
    codes = torch.randint(0, 256, (N, N), dtype=torch.uint8)
    video, text = torch.randn(N, 8, dtype=torch.float64), torch.randn(N, 8, dtype=torch.float64)
    ours = results(ops.DenseRelevancy(codes, 1 / 240), video, text)
    want = gradients(lambda v, t: oracle.sms(v, t, codes.double() * (1 / 240)), video, text)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def verb_noun(dtype, distinct):
    """(relevancy, the same matrix in float64): noun sets of up to five classes, or arbitrary overlaps."""
    sets = (torch.rand(23, 12) < 0.2).double()
    union = (sets[:, None] + sets > 0).sum(2).clamp_min(1)
    iou = (sets @ sets.T / union) if distinct == "few" else torch.rand(23, 23, dtype=torch.float64)
    verb, noun = torch.randint(0, 4, (N,)), torch.randint(0, 23, (N,))
    iou = iou.to(dtype)
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou.double()[noun[:, None], noun]
    return ops.VerbNounRelevancy(verb, noun, iou), matrix


@pytest.mark.parametrize("features", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("distinct", ["few", "many"])
def test_verbs_and_nouns_give_the_bits_of_their_matrix(features, stored, distinct):
    relevancy, matrix = verb_noun(stored, distinct)
    assert (relevancy.table.dtype == torch.uint8) == (distinct == "few")
    video, text = torch.randn(N, 16).to(features), torch.randn(N, 16).to(features)
    for options in ({}, {"backend": "reference"}, {"rule": "paper"}):
        ours, want = results(relevancy, video, text, **options), results(matrix, video, text, **options)
        assert all(map(torch.equal, ours, want))


def test_nan_in_the_overlap_of_nouns_reaches_the_loss():
    iou, verb, noun = torch.eye(5), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
    iou[0, 1] = torch.nan
    for backend in ("cpu", "reference"):
        assert ops.sms_loss(*torch.randn(2, 3, 8), ops.VerbNounRelevancy(verb, noun, iou), backend=backend).isnan()


def test_the_table_of_verbs_and_nouns_is_made_once_and_follows_its_tensor():
    iou, verb, noun = torch.eye(5), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
    first, second = (ops.VerbNounRelevancy(verb, noun, iou) for _ in range(2))
    assert first.table is second.table
    iou[1, 2] = 0.5
    third = ops.VerbNounRelevancy(verb, noun, iou)
    video, text = torch.randn(2, 3, 8)
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0.75], [0, 0.5, 1]])
    assert all(map(torch.equal, results(third, video, text), results(matrix, video, text)))


@pytest.mark.parametrize("features", [torch.float32, torch.float64], ids=str)
def test_quantised_labels_are_the_authors(features):
    """Their class: torch.tensor(matrix * 240, dtype=uint8), gathered, / 240."""
    matrix = torch.tensor([float(EK100[i]) for i in torch.randint(0, len(EK100), (70 * 60,))], dtype=torch.float64).view(70, 60)
    codes, values = ops.quantize_relevancy(matrix)
    assert torch.equal(codes, torch.tensor(matrix.numpy() * 240, dtype=torch.uint8))
    assert ops.quantize_relevancy(torch.tensor([0.5 + 0.5 * (2 / 3)], dtype=torch.float64))[0].item() == 199
    rows, columns, w = torch.randint(0, 70, (N,)), torch.randint(0, 60, (N,)), torch.rand(N, dtype=features)
    theirs = codes[rows][:, columns].double() / 240
    video, text = torch.randn(N, 16, dtype=features), torch.randn(N, 16, dtype=features)
    want = results(theirs, video, text, self_relevancy=w)
    for source in (ops.IndexedRelevancy(codes, rows, columns, values), ops.DenseRelevancy(codes[rows][:, columns], values)):
        assert all(map(torch.equal, results(source, video, text, self_relevancy=w), want))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_self_relevancy(backend):
    c, video, text = torch.rand(N, N), torch.randn(N, 8), torch.randn(N, 8)
    default, given = results(c, video, text, backend), results(c, video, text, backend, self_relevancy=c.diag())
    assert all(torch.equal(a, b) for a, b in zip(default, given, strict=True))
    w = torch.rand(2 * N, dtype=torch.float64)[::2]
    truth = oracle.sms(video.double(), text.double(), c, w.float())
    assert (results(c, video, text, backend, self_relevancy=w)[0] - truth).abs() < 1e-6


def test_indexed_labels_are_never_gathered_into_a_matrix():
    """The CPU backend allocates less in all than one [N, N], which the reference builds."""
    size, table = 4096, torch.rand(70, 60)
    index = torch.randint(0, 60, (size,))
    video, text, relevancy = torch.randn(size, 8), torch.randn(size, 8), ops.IndexedRelevancy(table, index, index)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ops.sms_loss(video, text, relevancy, backend="cpu")
    made = sum(max(event.cpu_memory_usage, 0) for event in profiler.events() if event.name == "[memory]")
    assert 0 < made < 4 * size**2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name,index,got", [("video_index", 9, 9), ("video_index", -1, -1), ("caption_index", 7, 7)])
def test_index_out_of_range(name, index, got, backend):
    indices = dict(video_index=torch.arange(3), caption_index=torch.arange(3))
    indices[name][1] = index
    relevancy = ops.IndexedRelevancy(torch.rand(9, 7), **indices)
    with pytest.raises(IndexError, match=rf"{name}: expected 0 <= index < .*\[9, 7\], got {got}"):
        ops.sms_loss(torch.randn(3, 4), torch.randn(3, 4), relevancy, backend=backend)


def test_unchecked_index_never_reads_outside():
    """validate=False cannot make the kernel read foreign memory; where nothing may wait for a GPU the loss becomes NaN."""
    relevancy = ops.IndexedRelevancy(torch.rand(9, 7), torch.tensor([0, 1, 9]), torch.arange(3))
    video, text = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(IndexError, match="video_index"):
        ops.sms_loss(video, text, relevancy, validate=False, backend="cpu")
    assert ops.sms_loss(video, text, relevancy, validate=False, backend="reference").isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_indices_are_checked_once(reduction, monkeypatch):
    relevancy = ops.IndexedRelevancy(torch.rand(9, 7), torch.arange(3), torch.arange(3))
    video, text = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    counts, original = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: counts.append(1) or original(x))
    for backend in ("cpu", "reference"):
        counts.clear()
        ops.sms_loss(video, text, relevancy, reduction=reduction, backend=backend).sum().backward()
        # Of the videos and of the captions, once a pass of C++ over them: each pair's own loss has a second one.
        assert len(counts) == (4 if backend == "cpu" and reduction == "none" else 2), backend
    counts.clear()
    ops.sms_loss(video, text, relevancy, validate=False, backend="reference")
    assert not counts
    with FlopCounterMode(display=False):  # a mode, which takes the call through torch's dispatcher
        ops.sms_loss(video, text, relevancy, backend="cpu")
    assert len(counts) == 2


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_table_with_an_empty_batch(shape):
    none = torch.zeros(0, dtype=torch.int64)
    relevancy = ops.IndexedRelevancy(torch.rand(shape), none, none)
    assert ops.sms_loss(torch.randn(0, 4), torch.randn(0, 4), relevancy) == 0


VIDEO, TEXT, LABELS = torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 3)


def sms(**change):
    good = dict(video=VIDEO, text=TEXT, relevancy=LABELS)
    return ops.sms_loss(**{**good, **change})


def clip(**change):
    return ops.clip_loss(**{**dict(video=VIDEO, text=TEXT, logit_scale=2.0), **change})


ID, CODES = torch.arange(3), torch.zeros(3, 3, dtype=torch.uint8)


def indexed(table=None, video_index=None, caption_index=None):
    default = (torch.rand(9, 7), torch.arange(3), torch.arange(3))
    given = (table, video_index, caption_index)
    return ops.IndexedRelevancy(*(d if g is None else g for d, g in zip(default, given, strict=True)))


META = torch.zeros(3, 4, device="meta")
NESTED = torch.nested.nested_tensor([torch.zeros(2, 3)])
BAD = [
    (lambda: sms(video=[1]), TypeError, r"video: expected a float32, .* tensor \[N, E\], got list"),
    (lambda: sms(text=torch.zeros(3, 4).long()), TypeError, "text: expected .*, got torch.int64"),
    (lambda: sms(video=torch.randn(3, 4).to_sparse()), TypeError, "video: expected a dense tensor, got a sparse_coo one"),
    (lambda: sms(video=NESTED), TypeError, "video: expected a dense tensor, got a nested one"),
    (lambda: sms(relevancy=NESTED), TypeError, "relevancy: expected a dense tensor, got a nested one"),
    (lambda: sms(video=torch.randn(3)), ValueError, r"video: expected the shape \[N, E\] with E > 0, got \[3\]"),
    (lambda: sms(video=torch.randn(3, 0)), ValueError, r"video: expected the shape \[N, E\] with E > 0, got \[3, 0\]"),
    (lambda: sms(text=torch.randn(3, 5)), ValueError, r"text: expected video's shape \[3, 4\], got \[3, 5\]"),
    (lambda: sms(text=torch.randn(4, 4)), ValueError, r"text: expected video's shape \[3, 4\], got \[4, 4\]"),
    (lambda: sms(text=torch.randn(3, 4).half()), TypeError, "text: expected video's dtype torch.float32, got torch.float16"),
    (lambda: sms(text=META), ValueError, "text: expected video's device cpu, got meta"),
    (lambda: sms(relevancy=None), TypeError, r"relevancy: expected a float tensor .*DenseRelevancy, got NoneType"),
    (lambda: sms(relevancy=[[1.0]]), TypeError, r"relevancy: expected a float tensor \[3, 3\], Indexed.*, got list"),
    (lambda: sms(relevancy=torch.ones(3, 3).long()), TypeError, "relevancy: expected a float tensor .*, got torch.int64"),
    (lambda: sms(relevancy=torch.ones(3)), ValueError, r"relevancy: expected the shape \[3, 3\].*, got \[3\]"),
    (lambda: sms(relevancy=torch.ones(3, 4)), ValueError, r"relevancy: expected the shape \[3, 3\], got \[3, 4\]"),
    (
        lambda: sms(relevancy=torch.ones(3, 3, device="meta")),
        ValueError,
        "relevancy: expected the features' device cpu, got meta",
    ),
    (lambda: sms(relevancy=torch.ones(3, 3).requires_grad_()), ValueError, "relevancy: requires a gradient"),
    (
        lambda: sms(relevancy=ops.DenseRelevancy(torch.zeros(2, 3, dtype=torch.uint8), 1.0)),
        ValueError,
        r"relevancy.codes: .*\[3, 3\]",
    ),
    (
        lambda: sms(relevancy=indexed(video_index=torch.arange(2), caption_index=torch.arange(2))),
        ValueError,
        "relevancy.video_index: expected 3 entries, one for each pair, got 2",
    ),
    (lambda: indexed(table=[1]), TypeError, r"table: expected a float tensor \[V, C\], or uint8 codes .* got list"),
    (lambda: indexed(table=torch.ones(3)), ValueError, r"table: expected the shape \[V, C\], .* got \[3\]"),
    (
        lambda: indexed(video_index=torch.ones(3)),
        TypeError,
        "video_index: expected a tensor of int64 or int32, got torch.float32",
    ),
    (
        lambda: indexed(caption_index=torch.zeros(3, 1).long()),
        ValueError,
        r"caption_index: expected the shape \[N\], got \[3, 1\]",
    ),
    (lambda: indexed(caption_index=torch.arange(4)), ValueError, "caption_index: expected 3 entries as video_index, got 4"),
    (
        lambda: indexed(table=torch.ones(9, 7, device="meta")),
        ValueError,
        "video_index: expected the table's device meta, got cpu",
    ),
    (lambda: ops.DenseRelevancy(torch.zeros(3, 3), 1.0), TypeError, "codes: expected a uint8 tensor, got torch.float32"),
    (
        lambda: ops.DenseRelevancy(torch.zeros(3, dtype=torch.uint8), 1.0),
        ValueError,
        r"codes: expected the shape \[N, N\], got \[3\]",
    ),
    (lambda: ops.DenseRelevancy(torch.zeros(3, 3, dtype=torch.uint8), "x"), TypeError, "scale: expected a float, got 'x'"),
    (
        lambda: ops.DenseRelevancy(torch.zeros(3, 3, dtype=torch.uint8), float("inf")),
        ValueError,
        "scale: expected a finite float",
    ),
    (lambda: sms(self_relevancy=[1.0]), TypeError, r"self_relevancy: expected a float tensor \[3\], got list"),
    (lambda: sms(self_relevancy=torch.ones(4)), ValueError, r"self_relevancy: expected the shape \[3\], got \[4\]"),
    (lambda: sms(self_relevancy=META[:, 0]), ValueError, "self_relevancy: expected the features' device cpu, got meta"),
    (lambda: sms(self_relevancy=torch.ones(3).requires_grad_()), ValueError, "self_relevancy: requires a gradient"),
    (lambda: sms(margin="x"), TypeError, "margin: expected a float, got 'x'"),
    (lambda: sms(margin=float("nan")), ValueError, "margin: expected a finite float, got nan"),
    (lambda: sms(relaxation=-1.0), ValueError, "relaxation: expected a float >= 0, got -1.0"),
    (lambda: sms(eps=float("inf")), ValueError, "eps: expected a finite float, got inf"),
    (lambda: sms(rule="new"), ValueError, 'rule: expected "code", "paper" or "charades", got \'new\''),
    (lambda: sms(reduction="sum"), ValueError, 'reduction: expected "mean" or "none", got \'sum\''),
    (lambda: sms(group=object()), TypeError, "group: expected a torch.distributed.ProcessGroup .*, got object"),
    (lambda: sms(grad_mode="mean"), ValueError, 'grad_mode: expected "ddp" or "sum", got \'mean\''),
    (lambda: sms(backend="triton"), RuntimeError, "sms_loss: backend 'triton' was asked for but cannot serve"),
    (lambda: sms(backend="x"), ValueError, "backend: expected one of auto"),
    (lambda: ops.mi_mm_loss([1], None), TypeError, "video: expected a float32"),
    (lambda: ops.mi_mm_loss(META, META, margin=None), TypeError, "margin: expected a float, got None"),
    (
        lambda: ops.adaptive_mi_mm_loss(torch.randn(3, 4), torch.randn(3, 4), torch.ones(2)),
        ValueError,
        r"self_relevancy: .*\[3\]",
    ),
    (lambda: clip(logit_scale="x"), TypeError, "logit_scale: expected a float, got 'x'"),
    (lambda: clip(logit_scale=torch.ones(2)), ValueError, r"logit_scale: expected one element, got the shape \[2\]"),
    (
        lambda: clip(logit_scale=torch.ones(1).long()),
        TypeError,
        "logit_scale: expected a float or a float tensor, got torch.int64",
    ),
    (lambda: clip(logit_scale=torch.ones((), device="meta")), ValueError, "logit_scale: expected the features' device cpu"),
    (lambda: clip(text=torch.randn(2, 4)), ValueError, "text: expected video's shape"),
    (lambda: clip(group="gloo"), TypeError, "group: expected a torch.distributed.ProcessGroup .*, got str"),
    (lambda: clip(backend="triton"), RuntimeError, "clip_loss: backend 'triton' was asked for but cannot serve"),
    (lambda: ops.VerbNounRelevancy(ID, ID, None), TypeError, r"noun_iou: expected a float tensor \[S, S\], got NoneType"),
    (lambda: ops.VerbNounRelevancy(ID, ID, torch.rand(3, 4)), ValueError, r"noun_iou: expected the shape \[S, S\], got .*4"),
    (lambda: ops.VerbNounRelevancy(ID.float(), ID, torch.rand(3, 3)), TypeError, "verb: expected a tensor of int64 or int32"),
    (lambda: ops.VerbNounRelevancy(ID, ID[:2], torch.rand(3, 3)), ValueError, "noun_set: expected 3 entries as verb, got 2"),
    (
        lambda: sms(relevancy=ops.VerbNounRelevancy(ID, ID + 2, torch.rand(3, 3))),
        IndexError,
        "noun_set: expected 0 <= index < 3",
    ),
    (
        lambda: sms(relevancy=ops.VerbNounRelevancy(ID[:2], ID[:2], torch.rand(3, 3))),
        ValueError,
        r"relevancy.noun_set: expected 3 entries, one for each pair, got 2",
    ),
    (lambda: ops.IndexedRelevancy(torch.rand(3, 3), ID, ID, 0.1), TypeError, r"table: expected uint8 codes .*float32"),
    (lambda: ops.IndexedRelevancy(CODES, ID, ID, torch.rand(9)), ValueError, r"scale: expected a float, or .* got .* \[9\]"),
    (lambda: ops.quantize_relevancy([0.5]), TypeError, "relevancy: expected a float tensor, got list"),
    (lambda: ops.quantize_relevancy(torch.tensor([1.1])), ValueError, "relevancy: expected values from 0 to 255 / 240"),
    (lambda: ops.quantize_relevancy(torch.tensor([-0.1])), ValueError, "relevancy: expected values from 0 to 255 / 240"),
    (lambda: ops.quantize_relevancy(torch.rand(2), 0), ValueError, "steps: expected a positive integer, got 0"),
    (lambda: torch.vmap(lambda v: sms(video=v))(torch.randn(2, 3, 4)), NotImplementedError, "video: sms_loss has no vmap rule"),
    (lambda: torch.vmap(lambda v: clip(text=v))(torch.randn(2, 3, 4)), NotImplementedError, "text: clip_loss has no vmap rule"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_threads_do_not_change_the_result():
    """Slopes and losses do not depend on who computes them; only torch's products may."""
    video, text, c = torch.randn(300, 1), torch.randn(300, 1), torch.rand(300, 300)  # E = 1: products have one term
    before, every = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            every.append(ops.sms_loss(video, text, c, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, every[0]) for x in every)


def test_parts_that_were_exchanged_are_checked_again():
    """They are public, and C++ reads what they say."""
    N = 64
    video, text = torch.randn(2, N, 9).unbind()
    rows, columns = torch.randint(0, 5, (N,)), torch.randint(0, 4, (N,))

    def changed(source, **parts):
        for name, x in parts.items():
            setattr(source, name, x)
        return source

    indexed = lambda: ops.IndexedRelevancy(torch.rand(5, 4), rows, columns)  # noqa: E731
    nouns = ops.VerbNounRelevancy(rows, columns, torch.rand(4, 4))
    codes = ops.DenseRelevancy(torch.zeros(N, N, dtype=torch.uint8), 1.0)
    for source, error, message in (
        (changed(indexed(), caption_index=columns[:1].clone()), ValueError, r"relevancy.caption_index: expected 64 entries"),
        (changed(indexed(), caption_index=columns.float()), TypeError, "relevancy.caption_index: expected int64 or int32"),
        (changed(nouns, verb=rows[:1].clone()), ValueError, "relevancy.verb: expected 64 entries"),
        (changed(codes, codes=torch.rand(N, N)), TypeError, "relevancy.codes: expected uint8 codes beside their values"),
    ):
        with pytest.raises(error, match=message):
            ops.sms_loss(video, text, source)


def test_indices_are_checked_in_the_backward_pass_too():
    """It reads them again, and autograd does not see what was written through .data or by numpy."""
    video, index = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
    loss = ops.sms_loss(video, video * 2 + 1, ops.IndexedRelevancy(torch.rand(3, 3), index, index.clone()), reduction="none")
    index.data.fill_(10**9)
    with pytest.raises(IndexError, match="video_index: expected 0 <= index < 3"):
        loss.sum().backward()


def test_a_table_made_in_inference_mode_serves_training():
    video, ids, iou = torch.randn(6, 4), torch.arange(6) % 4, torch.rand(4, 4)
    with torch.inference_mode():
        made_there = torch.rand(4, 4)
        want = ops.sms_loss(video, video, ops.VerbNounRelevancy(ids, ids, iou), reduction="none")
    leaf = video.clone().requires_grad_()
    loss = ops.sms_loss(leaf, video, ops.VerbNounRelevancy(ids, ids, iou), reduction="none")
    loss.sum().backward()
    assert torch.equal(loss, want) and leaf.grad.isfinite().all()
    ops.sms_loss(leaf, video, ops.VerbNounRelevancy(ids, ids, made_there), reduction="none").sum().backward()
