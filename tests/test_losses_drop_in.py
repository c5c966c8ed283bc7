"""The losses under other repositories' names: their arguments and results, against their mathematics in float64."""

import copy
import inspect
import pickle

import pairwise_oracle as oracle
import pytest
import torch
from peers import peer

from evaat_fast.losses import avion, egovlp, lavila, open_clip

F32, F64 = torch.float32, torch.float64
DISTRIBUTED = {"local_loss": False, "gather_with_grad": False}
RANKS = {"rank": 0, "world_size": 1}
CACHED = {**DISTRIBUTED, "cache_labels": False, **RANKS}
HOROVOD = {"use_horovod": False}
MARGIN = {"margin": 0.2, "fix_norm": True}
ADAPTIVE = {"margin": 0.4, "fix_norm": True}
FEATURES = {"image_features": ..., "text_features": ...}
# The constructor's arguments and the forward's, in their order, with their defaults.
THEIRS = {
    avion.ClipLoss: ({**CACHED, **HOROVOD}, {**FEATURES, "logit_scale": ...}),
    avion.MaxMarginRankingLoss: ({**MARGIN, **DISTRIBUTED, **RANKS, **HOROVOD}, {**FEATURES, "weight": None}),
    avion.AdaptiveMaxMarginRankingLoss: (
        {"margin": 0.4, "temperature": 0.05, "fix_norm": True, **DISTRIBUTED, **RANKS, **HOROVOD},
        {**FEATURES, "weight": None, "ignored": ...},
    ),
    avion.SymmetricMultiSimiliarityLoss: (
        {"margin": 0.6, "thres": 0.1, "matrix": None, "fix_norm": True, **DISTRIBUTED, **RANKS, **HOROVOD},
        {**FEATURES, "weight": None, "relevancy_weight": None},
    ),
    lavila.CLIPLoss: ({"use_vissl": False, **CACHED}, {"outputs": ...}),
    lavila.SSLCLIPLoss: (
        {"use_vissl": False, **CACHED, "scale_init": 0.08, "freeze_scale": False},
        {"outputs": ..., "gt_indicators": ...},
    ),
    lavila.MaxMarginRankingLoss: (MARGIN, {"outputs": ..., "weight": None}),
    lavila.AdaptiveMaxMarginRankingLoss: (ADAPTIVE, {"outputs": ..., "weight": None}),
    egovlp.NormSoftmaxLoss: ({"temperature": 0.05}, {"x": ...}),
    egovlp.EgoNCE: ({"temperature": 0.05, "noun": True, "verb": True}, {"x": ..., "mask_v": ..., "mask_n": ...}),
    egovlp.MaxMarginRankingLoss: (MARGIN, {"x": ..., "weight": None}),
    egovlp.AdaptiveMaxMarginRankingLoss: (ADAPTIVE, {"x": ..., "weight": None}),
    open_clip.ClipLoss: (
        {**CACHED, **HOROVOD},
        {**FEATURES, "logit_scale": ..., "logit_bias": None, "output_dict": False},
    ),
}
names = pytest.mark.parametrize("make", THEIRS, ids=lambda make: f"{make.__module__.rsplit('.', 1)[1]}.{make.__name__}")


def arguments(function):
    found = inspect.signature(function).parameters.values()
    return [(p.name, ... if p.default is p.empty else p.default) for p in found if p.name != "self"]


@names
def test_arguments_have_their_names_order_and_defaults(make):
    for function, theirs in zip((make, make.forward), THEIRS[make], strict=True):
        assert arguments(function) == list(theirs.items())


def features(seed, least=2):
    """(N, images, texts) of float64: random, close to each other or not."""
    torch.manual_seed(seed)
    N, E = int(torch.randint(least, 8, ())), int(torch.randint(1, 20, ()))
    images = torch.randn(N, E, dtype=F64)
    return N, images, seed % 3 * images + torch.randn(N, E, dtype=F64)


def infonce(logits):
    """Both directions of logits [N, N], which may be rectangular: the mean log-probability of the diagonal, added."""
    directions = (torch.softmax(x, 1).diagonal().log().mean() for x in (logits, logits.T))
    return -sum(directions)


def ranking(x, margins, fix_norm):
    """Term by term, i the anchor in the rows and in the columns."""
    N, terms = len(x), []
    for i in range(N):
        for j in range(N):
            if i != j or not fix_norm:
                terms += [(margins[i] - x[i, i] + other).relu() for other in (x[i, j], x[j, i])]
    return torch.stack(terms).mean()


def agree(ours, want, *inputs):
    """Losses and gradients, in float64 and with ours in float32."""
    truth = oracle.gradients(want, *inputs)
    for dtype, rtol in ((F64, 1e-11), (F32, 1e-4)):
        for a, b in zip(oracle.gradients(ours, *(x.to(dtype) for x in inputs)), truth, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.to(F64), b, rtol=rtol, atol=rtol * max(float(b.abs().max()), 1e-3))


def outputs(images, texts, scale):
    return {"image_embed": images, "text_embed": texts, "logit_scale": scale, "text_tokens": None}


def per_cent(logits, some=slice(None)):
    return 100 * (logits.argmax(1) == torch.arange(len(logits)))[some].double().mean()


@pytest.mark.parametrize("seed", range(9))
def test_contrastive_losses(seed):
    N, images, texts = features(seed)
    scale = torch.tensor([1.0, 5.0, 30.0][seed % 3], dtype=F64)

    def want(v, t, s):
        return infonce(s * v @ t.T) / 2

    cached = {"cache_labels": seed % 2 == 0}
    for call in (
        lambda v, t, s: avion.ClipLoss(**cached)(v, t, s)["loss"],
        lambda v, t, s: lavila.CLIPLoss(use_vissl=seed % 2 == 1, **cached)(outputs(v, t, s))["loss"],
        lambda v, t, s: open_clip.ClipLoss(**cached)(v, t, s),
        lambda v, t, s: open_clip.ClipLoss(**cached)(v, t, s.reshape(1), logit_bias=torch.ones(1), output_dict=True)[
            "contrastive_loss"
        ],
    ):
        agree(call, want, images, texts, scale)
    for found in (avion.ClipLoss()(images, texts, scale), lavila.CLIPLoss()(outputs(images, texts, scale))):
        assert abs(found["clip_acc"] - per_cent(images @ texts.T)) < 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_temperatures_of_labelled_and_pseudo_labelled_pairs(seed):
    N, images, texts = features(seed, 4)
    labelled = torch.arange(N) % 3 == 0
    scale, first = torch.tensor(9.0, dtype=F64), 0.2

    def logits(v, t, s):
        mine = torch.where(labelled, s, 1 / torch.tensor(first, dtype=F64))
        return (mine[:, None] * mine[None, :]).sqrt() * (v @ t.T)

    criterion = lavila.SSLCLIPLoss(scale_init=first, freeze_scale=True).double()
    criterion.logit_scale_pseudo.copy_(-torch.tensor(first, dtype=F64).log())
    found = criterion(outputs(images, texts, scale), labelled.long())
    agree(lambda *x: criterion(outputs(*x), labelled.long())["loss"], lambda *x: infonce(logits(*x)) / 2, images, texts, scale)
    assert found["num_gt"].tolist() == [int(labelled.sum())] and found["num_pseudo"].tolist() == [N - int(labelled.sum())]
    for name, some in (("clip_acc", slice(None)), ("clip_acc_gt", labelled), ("clip_acc_pseudo", ~labelled)):
        assert abs(found[name] - per_cent(logits(images, texts, scale), some)) < 1e-4


def test_the_temperature_of_pseudo_labels_is_learned_and_saved():
    N, images, texts = features(0, 6)
    criterion, kept = lavila.SSLCLIPLoss(), lavila.SSLCLIPLoss(freeze_scale=True)
    assert list(criterion.state_dict()) == ["logit_scale_pseudo"] and not kept.logit_scale_pseudo.requires_grad
    assert abs(criterion.logit_scale_pseudo.exp() - 12.5) < 1e-5
    criterion(outputs(images, texts, 3.0), torch.zeros(N))["loss"].backward()
    assert criterion.logit_scale_pseudo.grad != 0
    result = criterion(outputs(images, texts, torch.tensor(3.0)), torch.zeros(N))
    assert result["clip_acc_gt"].isnan() and result["num_gt"] == 0


@pytest.mark.parametrize("fix_norm", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_max_margin_losses(seed, fix_norm):
    N, images, texts = features(seed)
    margin, weight = [0.2, 0.4, -0.1][seed % 3], torch.rand(N, dtype=F64)
    same = torch.full((N,), margin, dtype=F64)

    def cosines(v, t):
        return oracle.unit(t) @ oracle.unit(v).T

    for (ours, theirs), margins, extra in (
        ((avion.MaxMarginRankingLoss, lavila.MaxMarginRankingLoss), same, ()),
        # A relevancy of float64 leaves the loss in the features' precision.
        ((avion.AdaptiveMaxMarginRankingLoss, lavila.AdaptiveMaxMarginRankingLoss), margin * weight, (weight,)),
    ):
        of_features, of_outputs = ours(margin, fix_norm=fix_norm), theirs(margin, fix_norm)

        def want(v, t, margins=margins):
            return ranking(cosines(v, t), margins, fix_norm)

        agree(lambda v, t, of=of_features, extra=extra: of(v, t, *extra)["loss"], want, images, texts)
        agree(lambda v, t, of=of_outputs, extra=extra: of(outputs(v, t, 1.0), *extra)["loss"], want, images, texts)
    x = cosines(images, texts)
    agree(egovlp.MaxMarginRankingLoss(margin, fix_norm), lambda x: ranking(x, same, fix_norm), x)
    criterion = egovlp.AdaptiveMaxMarginRankingLoss(margin, fix_norm)
    agree(lambda x: criterion(x, weight.to(x.dtype)), lambda x: ranking(x, margin * weight, fix_norm), x)
    assert criterion(x.float(), weight).dtype == F64 and criterion(x, torch.ones(N, dtype=torch.int64)).dtype == F64


@pytest.mark.parametrize("seed", range(6))
def test_losses_of_a_matrix_of_cosines(seed):
    torch.manual_seed(seed)
    N, M = (int(x) for x in torch.randint(2, 12, (2,)))
    x, temperature = torch.rand(N, M, dtype=F64) * 2 - 1, [0.05, 0.3][seed % 2]
    # The precision of float32 is that of the matrix, which the temperature multiplies.
    exact = x.float().double()
    agree(egovlp.NormSoftmaxLoss(temperature), lambda x: infonce(x / temperature), exact)
    x = exact[: min(N, M), : min(N, M)]
    masks = [(torch.rand(x.shape) < 0.4).double() * torch.rand(x.shape) for _ in range(2)]
    for noun, verb in ((True, True), (False, True), (True, False)):
        positive = ((masks[0] if verb else 1) * (masks[1] if noun else 1) > 0) | torch.eye(len(x), dtype=torch.bool)

        def want(x, positive=positive):
            return -sum((torch.softmax(s / temperature, 1) * positive).sum(1).log().mean() for s in (x, x.T))

        criterion = egovlp.EgoNCE(temperature, noun, verb)
        agree(lambda x, criterion=criterion: criterion(x, *masks), want, x)


def test_norm_softmax_keeps_what_a_trained_batch_still_costs():
    x = torch.nn.functional.normalize(torch.randn(256, 256), dim=1)
    x = x @ x.T
    ours, truth = (oracle.gradients(egovlp.NormSoftmaxLoss(), cast(x)) for cast in (torch.Tensor.float, torch.Tensor.double))
    assert 1e-7 < truth[0] < 1e-4
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_ties_at_zero_have_no_slope():
    """Two captions of one clip, and no margin: relu'(0) = 0, as theirs."""
    x = torch.tensor([[0.3, 0.3], [0.1, 0.7]])
    _, slopes = oracle.gradients(egovlp.MaxMarginRankingLoss(0.0), x)
    assert torch.equal(slopes, torch.zeros(2, 2))
    _, slopes = oracle.gradients(egovlp.MaxMarginRankingLoss(0.1), x)
    assert torch.equal(slopes, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "loss", [egovlp.NormSoftmaxLoss(), egovlp.EgoNCE(), egovlp.MaxMarginRankingLoss()], ids=lambda x: type(x).__name__
)
def test_matrices_of_an_autocast_product_are_read_in_float32(loss):
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, 20, 16), dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        x = rows[0] @ rows[1].T
        masks = (torch.eye(20),) * 2 if isinstance(loss, egovlp.EgoNCE) else ()
        ours = loss(x, *masks)
    assert x.dtype == torch.bfloat16 and ours.dtype == F32
    torch.testing.assert_close(ours, loss(x.double(), *masks).float(), rtol=1e-5, atol=0)


def test_features_of_two_precisions_under_autocast():
    torch.manual_seed(0)
    images, texts = torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for criterion, more in ((avion.ClipLoss(), (3.0,)), (avion.MaxMarginRankingLoss(), ())):
            assert criterion(images.bfloat16(), texts, *more)["loss"].dtype == F32
    with pytest.raises(TypeError, match="text: expected video's dtype"):
        avion.ClipLoss()(images.bfloat16(), texts, 3.0)


def test_results():
    N, images, texts = features(1)
    images.requires_grad_()
    assert list(avion.ClipLoss()(images, texts, 2.0)) == ["loss", "clip_acc"]
    for found in (
        avion.MaxMarginRankingLoss()(images, texts),
        lavila.MaxMarginRankingLoss()(outputs(images, texts, 1.0)),
        avion.SymmetricMultiSimiliarityLoss()(images, texts, torch.ones(N)),
    ):
        assert list(found) == ["loss", "max_margin_loss"]
        whole = found["max_margin_loss"].detach().clone()
        found["loss"] /= 4  # as a script that accumulates gradients does, and then logs both
        assert torch.equal(found["max_margin_loss"], whole) and found["max_margin_loss"].requires_grad
    found = lavila.CLIPLoss()(outputs(images, texts, 2.0))
    assert list(found) == ["loss", "clip_loss", "clip_acc"] and found["loss"] is found["clip_loss"]
    names = ["loss", "clip_loss", "num_gt", "num_pseudo", "clip_acc", "clip_acc_gt", "clip_acc_pseudo"]
    assert list(lavila.SSLCLIPLoss()(outputs(images, texts, 2.0), torch.ones(N))) == names
    assert list(open_clip.ClipLoss()(images, texts, 2.0, output_dict=True)) == ["contrastive_loss"]
    assert open_clip.ClipLoss()(images, texts, 2.0).shape == ()


@pytest.mark.parametrize("N", [0, 1])
def test_no_pair_costs_nothing(N):
    x, images = torch.zeros(N, N), torch.ones(N, 4)
    for call, leaf in (
        (lambda x: egovlp.NormSoftmaxLoss()(x), x),
        (lambda x: egovlp.MaxMarginRankingLoss()(x), x),
        (lambda x: egovlp.AdaptiveMaxMarginRankingLoss()(x, torch.ones(N)), x),
        (lambda x: avion.MaxMarginRankingLoss()(x, images)["loss"], images),
        (lambda x: lavila.CLIPLoss()(outputs(x, images, 2.0))["loss"], images),
        (lambda x: open_clip.ClipLoss()(x, images, 2.0), images),
    ):
        loss, gradient = oracle.gradients(call, leaf)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(leaf))
    # Without fix_norm a pair's own margin counts, which one pair has.
    for loss in (
        egovlp.MaxMarginRankingLoss(fix_norm=False)(x),
        avion.MaxMarginRankingLoss(fix_norm=False)(images, images)["loss"],
    ):
        assert abs(loss - 0.2 * N) < 1e-7


def test_a_nan_reaches_the_loss_of_a_matrix():
    for at in ((0, 0), (1, 2)):
        x = torch.rand(4, 4)
        x[at] = float("nan")
        assert egovlp.NormSoftmaxLoss()(x).isnan() and egovlp.MaxMarginRankingLoss()(x).isnan()


def test_a_bias_of_all_logits_has_a_gradient_of_exactly_zero():
    N, images, texts = features(2, 5)
    bias = torch.tensor([-10.0], requires_grad=True)
    open_clip.ClipLoss()(images, texts, 5.0, bias).backward()
    assert torch.equal(bias.grad, torch.zeros(1))
    each = torch.randn(N, dtype=F64)

    def want(v, t, b):  # of texts, in the columns of either direction's logits
        return -sum(torch.softmax(5.0 * a @ c.T + b, 1).diagonal().log().mean() for a, c in ((v, t), (t, v))) / 2

    agree(lambda v, t, b: open_clip.ClipLoss()(v, t, 5.0, b), want, images, texts, each)


def test_subclasses_of_open_clip_s_change_the_logits():
    N, images, texts = features(3, 5)

    class Clamped(open_clip.ClipLoss):
        def get_logits(self, *arguments, **options):
            return tuple(x.clamp(-1, 1) for x in super().get_logits(*arguments, **options))

    want = infonce((2.0 * images @ texts.T).clamp(-1, 1)) / 2
    torch.testing.assert_close(Clamped()(images, texts, 2.0), want, rtol=1e-11, atol=0)
    criterion = open_clip.ClipLoss(cache_labels=True)
    assert torch.equal(criterion.get_logits(images, texts, 2.0, 1.0)[1], 2.0 * texts @ images.T + 1.0)
    assert criterion.get_ground_truth(images.device, N) is criterion.get_ground_truth(images.device, N)
    assert criterion.get_ground_truth(images.device, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_open_clip_itself(seed):
    theirs = peer("open_clip.loss").ClipLoss
    N, images, texts = features(seed)
    scale = torch.tensor(7.0, dtype=F64)
    options = {"cache_labels": seed % 2 == 0}
    more = {"output_dict": True, "logit_bias": None if seed % 3 else torch.tensor(-2.0, dtype=F64)}
    criteria = theirs(**options), open_clip.ClipLoss(**options)
    found = [oracle.gradients(lambda *x, of=of: of(*x, **more)["contrastive_loss"], images, texts, scale) for of in criteria]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    missing = set(vars(criteria[0])) - set(vars(criteria[1]))
    assert not missing


@names
def test_pickles_and_copies(make):
    extra = {"matrix": torch.rand(3, 3)} if make is avion.SymmetricMultiSimiliarityLoss else {}
    criterion = make(**extra)
    for other in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert type(other) is make and list(vars(other)) == list(vars(criterion))
        assert list(other.state_dict()) == list(criterion.state_dict())


def test_compiles_whole():
    N, images, texts = features(4, 5)
    scale = torch.tensor(3.0, dtype=F64)
    criterion = lavila.CLIPLoss()
    whole = torch.compile(lambda v, t, s: criterion(outputs(v, t, s))["loss"], backend="aot_eager", fullgraph=True)
    for a, b in zip(
        oracle.gradients(whole, images, texts, scale),
        oracle.gradients(lambda v, t, s: criterion(outputs(v, t, s))["loss"], images, texts, scale),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    x = torch.rand(6, 6)
    criterion = egovlp.AdaptiveMaxMarginRankingLoss()
    whole = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x, torch.ones(6)), criterion(x, torch.ones(6)))


BAD = [
    (lambda: egovlp.MaxMarginRankingLoss()(torch.zeros(2, 3)), ValueError, r"x: expected the shape \[N, N\], got \[2, 3\]"),
    (lambda: egovlp.NormSoftmaxLoss()(torch.zeros(3)), ValueError, r"x: expected the shape \[N, M\], got \[3\]"),
    (lambda: egovlp.AdaptiveMaxMarginRankingLoss()(torch.zeros(2, 2)), TypeError, r"weight: expected a tensor \[N\]"),
    (
        lambda: egovlp.AdaptiveMaxMarginRankingLoss()(torch.zeros(2, 2), torch.ones(3)),
        ValueError,
        r"weight: expected the shape \[2\], got \[3\]",
    ),
    (lambda: lavila.CLIPLoss()({"image_embed": torch.zeros(2, 2)}), KeyError, "text_embed"),
    (lambda: open_clip.ClipLoss(use_horovod=True), ValueError, "use_horovod: expected False"),
    (lambda: open_clip.ClipLoss()(None, torch.ones(2, 3), 1.0), TypeError, "image features: expected a tensor, got NoneType"),
    (
        lambda: avion.ClipLoss()(torch.ones(2, 3), torch.ones(2, 4), 1.0),
        ValueError,
        r"text features: .* \[2, 3\], got \[2, 4\]",
    ),
    (lambda: egovlp.EgoNCE()(torch.ones(3), torch.eye(3), torch.eye(3)), ValueError, r"x: .* \[N, N\], got \[3\]"),
    (lambda: egovlp.EgoNCE()(torch.eye(3), torch.ones(3), torch.eye(3)), ValueError, r"mask_v: .* \[3, 3\], got \[3\]"),
    (lambda: lavila.SSLCLIPLoss()(pair(3, 2), torch.ones(2)), ValueError, r"gt_indicators: .* \[3\], got \[2\]"),
    (lambda: lavila.SSLCLIPLoss()(pair(3), torch.ones(3)), ValueError, r"image features: .* \[N, E\], got \[3\]"),
]


def pair(*shape):
    return {"image_embed": torch.ones(shape), "text_embed": torch.ones(shape), "logit_scale": torch.tensor(1.0)}


@pytest.mark.parametrize("call,error,message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
