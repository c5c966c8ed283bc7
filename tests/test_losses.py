"""The loss modules: constructors and results of the repositories they stand in for, in steps written the way theirs are."""

import inspect
import subprocess
import sys

import losses_ranks
import pairwise_oracle as oracle
import pytest
import torch

from evaat_fast import losses, ops

F32, F64 = torch.float32, torch.float64
GATHERING = ["local_loss", "gather_with_grad", "rank", "world_size", "use_horovod"]
THEIRS = {
    "ClipLoss": ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod"],
    "MaxMarginRankingLoss": ["margin", "fix_norm", *GATHERING],
    "AdaptiveMaxMarginRankingLoss": ["margin", "temperature", "fix_norm", *GATHERING],
    "SymmetricMultiSimiliarityLoss": ["margin", "thres", "matrix", "fix_norm", *GATHERING],
    "EgoNCE": ["temperature", "noun", "verb"],
}
DEFAULTS = {"MaxMarginRankingLoss": 0.2, "AdaptiveMaxMarginRankingLoss": 0.4, "SymmetricMultiSimiliarityLoss": 0.6}


def batch(N=12, E=16, dtype=F64):
    video = torch.randn(N, E, dtype=dtype)
    return video, 0.7 * video + torch.randn(N, E, dtype=dtype)


@pytest.mark.parametrize("name", THEIRS)
def test_constructors_take_the_same_arguments_in_the_same_order(name):
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert list(parameters) == THEIRS[name]
    assert name not in DEFAULTS or parameters["margin"].default == DEFAULTS[name]


def relevancies(V=40, C=30):
    """EPIC-Kitchens' values, among them one that 240 truncated steps do not hold."""
    values = torch.tensor([0.0, 0.5, 1.0, 0.5 + 0.5 * (2 / 3), 0.25, 1 / 6, 0.5 + 0.25], dtype=F64)
    return values[torch.randint(0, len(values), (V, C))]


@pytest.mark.parametrize("as_numpy", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_sms_is_the_authors(labelled, as_numpy):
    video, text = batch()
    matrix, N = relevancies(), len(video)
    rows, columns = torch.randint(0, 40, (N,)), torch.randint(0, 30, (N,))
    weight = matrix[rows, columns]
    criterion = losses.SymmetricMultiSimiliarityLoss(matrix=matrix.numpy() if as_numpy else matrix)
    ours = criterion(video, text, weight=weight, relevancy_weight=torch.cat((columns, rows)) if labelled else None)
    # Theirs divides uint8 by 240 in torch's default dtype, float32, and computes in float64 from there.
    codes = torch.tensor(matrix.numpy() * 240, dtype=torch.uint8)
    c = (codes[rows][:, columns] / 240) if labelled else torch.zeros(N, N)
    want = oracle.sms(video, text, c, weight)
    assert set(ours) == {"loss", "max_margin_loss"} and ours["loss"].dtype == F64
    assert abs(ours["loss"] - want) <= 1e-15 * max(1, abs(want)) * 4
    assert not list(criterion.state_dict()) and not list(criterion.parameters())


def test_sms_takes_integer_weights_as_validation_gives_them():
    video, text = batch()
    ours = losses.SymmetricMultiSimilarityLoss(matrix=relevancies())(video, text, weight=torch.ones(12, dtype=torch.int64))
    torch.testing.assert_close(ours["loss"], ops.mi_mm_loss(video, text, margin=0.6))


@pytest.mark.parametrize("fix_norm", [True, False])
def test_max_margin_losses_are_the_published(fix_norm):
    video, text = batch()
    x, weight = oracle.unit(text) @ oracle.unit(video).T, torch.rand(12, dtype=F64)
    for criterion, w in (
        (losses.MaxMarginRankingLoss(fix_norm=fix_norm), torch.full((12,), 0.2, dtype=F64)),
        (losses.AdaptiveMaxMarginRankingLoss(fix_norm=fix_norm), 0.4 * weight),
    ):
        terms = torch.stack([(w[:, None] - x.diag()[:, None] + s).relu() for s in (x, x.T)])
        keep = ~torch.eye(12, dtype=torch.bool) if fix_norm else torch.ones(12, 12, dtype=torch.bool)
        ours = criterion(video, text, weight=weight)
        torch.testing.assert_close(ours["loss"], terms[:, keep].mean(), rtol=1e-13, atol=0)
        assert torch.equal(ours["max_margin_loss"], ours["loss"])


def test_clip_loss_and_accuracy():
    video, text = batch()
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    ours = losses.ClipLoss(cache_labels=True)(video, text, scale)
    torch.testing.assert_close(ours["loss"], oracle.clip(video, text, scale), rtol=1e-12, atol=0)
    assert abs(ours["clip_acc"] - 100 * ((video @ text.T).argmax(1) == torch.arange(12)).double().mean()) < 1e-4
    (gradient,) = torch.autograd.grad(ours["loss"], scale)
    torch.testing.assert_close(gradient, torch.autograd.grad(oracle.clip(video, text, scale), scale)[0])


def test_the_accuracy_of_a_batch_whose_logits_are_never_all_there():
    video, text = batch(3000, 4, F64)  # 72 MB of them
    ours = losses.ClipLoss()(video, text, 3.0)["clip_acc"]
    assert abs(ours - 100 * ((video @ text.T).argmax(1) == torch.arange(3000)).double().mean()) < 1e-4


@pytest.mark.parametrize("options", [{}, {"noun": False}, {"verb": False}, {"temperature": 0.2}])
def test_ego_nce_is_the_published(options):
    x = (torch.rand(15, 15, dtype=F64) * 2 - 1).requires_grad_()
    mask_v, mask_n = ((torch.rand(15, 15, dtype=F64) < 0.3).double() for _ in range(2))
    temperature, noun, verb = options.get("temperature", 0.05), options.get("noun", True), options.get("verb", True)
    mask = mask_v * mask_n if noun and verb else mask_n if noun else mask_v
    positive = mask + torch.eye(15) > 0
    want = -sum(torch.log((torch.softmax(s / temperature, 1) * positive).sum(1)).mean() for s in (x, x.T))
    ours = losses.EgoNCE(**options)(x, mask_v, mask_n)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, want)), rtol=1e-10, atol=1e-14)


def test_ego_nce_keeps_what_a_trained_batch_still_costs():
    """A loss of 3e-6, where the difference of two log-sum-exps near 20 is off by 2e-6 in float32, its gradient by a third."""
    x = torch.nn.functional.normalize(torch.randn(256, 256), dim=1)
    x, ones, eye = x @ x.T, torch.ones(256, 256), torch.eye(256)
    ours, truth = (
        oracle.gradients(lambda s: losses.EgoNCE()(s, ones, eye), cast(x)) for cast in (torch.Tensor.float, torch.Tensor.double)
    )
    assert 1e-7 < truth[0] < 1e-4
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_a_training_step_as_avion_writes_it():
    model = torch.nn.ModuleDict({"image": torch.nn.Linear(16, 8), "text": torch.nn.Linear(16, 8)})
    matrix, optimizer = relevancies(), torch.optim.AdamW(model.parameters(), 1e-2)
    criterion = losses.SymmetricMultiSimiliarityLoss(
        margin=0.6, thres=0.1, matrix=matrix, local_loss=False, gather_with_grad=True, rank=0, world_size=1
    )
    frames, captions = batch(20, 16, F32)
    rows, columns = torch.randint(0, 40, (20,)), torch.randint(0, 30, (20,))
    seen = []
    for _ in range(10):
        image_features, text_features = model["image"](frames), model["text"](captions)
        loss_dict = criterion(
            image_features, text_features, weight=matrix[rows, columns], relevancy_weight=torch.cat((columns, rows))
        )
        loss = loss_dict["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({k: v.item() for k, v in loss_dict.items()}["max_margin_loss"])
    assert seen[-1] < 0.9 * seen[0]


def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(tmp_path):
    command = [sys.executable, losses_ranks.__file__, str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.stdout.count("agrees") == 2, run.stdout + run.stderr


def labels_without_a_matrix():
    losses.SymmetricMultiSimilarityLoss()(*batch(), torch.ones(12), torch.zeros(24).long())


BAD = [
    (lambda: losses.ClipLoss(use_horovod=True), ValueError, "use_horovod: expected False"),
    (lambda: losses.SymmetricMultiSimilarityLoss(fix_norm=False), ValueError, "fix_norm: expected True"),
    (lambda: losses.SymmetricMultiSimilarityLoss()(*batch()), TypeError, r"weight: expected a tensor \[N\]"),
    (lambda: losses.AdaptiveMaxMarginRankingLoss()(*batch()), TypeError, r"weight: expected a tensor \[N\]"),
    (labels_without_a_matrix, ValueError, "relevancy_weight: expected None, as the loss was made without a matrix"),
    (lambda: losses.SymmetricMultiSimilarityLoss(matrix=torch.full((2, 2), 1.5)), ValueError, "relevancy: expected val"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
