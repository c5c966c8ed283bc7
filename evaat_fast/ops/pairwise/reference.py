"""The specification of the pairwise losses, which builds their [N, N] matrices."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Rule = Literal["code", "paper", "charades"]


@dataclass(frozen=True)
class Penalty:
    """What a pair costs in a max-margin loss, as `sms_loss` describes it."""

    margin: float
    relaxation: float
    eps: float
    rule: str


def wide(dtype: torch.dtype) -> torch.dtype:
    """That of the computation."""
    return torch.promote_types(dtype, torch.float32)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| by rows; a row with |x| < 1e-8 is divided by 1e-8 and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit = x / norm.clamp_min(1e-8)
    return torch.where(norm < 1e-8, unit.detach(), unit)


def sms_loss_reference(
    video: Tensor,
    text: Tensor,
    relevancy: Tensor,
    self_relevancy: Tensor,
    margin: float,
    relaxation: float,
    eps: float,
    rule: str = "code",
    reduction: str = "mean",
) -> Tensor:
    """relevancy [N, N] (rows = videos) and self_relevancy [N] have the dtype of the computation: float32, or float64 for
    float64 features.

    x_ij = t_i . v_j of unit rows, c_ij = relevancy[j, i], w = self_relevancy. Every i != j counts twice, from text i and from
    video j: m1 = margin * (w_i - c_ij) - (x_ii - x_ij) and m2 = margin * (w_j - c_ij) - (x_jj - x_ij).
    """
    N, dtype = video.shape[0], relevancy.dtype
    x = unit_rows(text.to(dtype)) @ unit_rows(video.to(dtype)).T
    diagonal = torch.eye(N, dtype=torch.bool, device=x.device)
    terms = []
    for anchor in (1, 0):  # text i stands in the rows, video j in the columns
        d = self_relevancy.unsqueeze(anchor) - relevancy.T
        gap = x.diagonal().unsqueeze(anchor) - x
        terms.append(penalty(d, gap, margin, relaxation, eps, rule).masked_fill(diagonal, 0.0))
    return _reduced((terms[0].sum(1) + terms[1].sum(0)) / max(2 * (N - 1), 1), reduction)


def penalty(d: Tensor, gap: Tensor, margin: float, relaxation: float, eps: float, rule: str) -> Tensor:
    """f(m, d) of one side. The rules differ in what d == eps means, in whether equal labels keep their margin * d, and in
    whether a pair of a higher label than the anchor's own counts."""
    m = margin * d - gap
    equal, more = d.abs() < eps, (d > eps if rule == "code" else d >= eps)
    near = m if rule == "code" else -gap
    less = (-m).relu()
    if rule == "charades":
        less = less.masked_fill(d <= -eps, 0.0)
    return torch.where(equal, (near.abs() - relaxation).relu(), torch.where(more, m.relu(), less))


def clip_loss_reference(video: Tensor, text: Tensor, logit_scale: float | Tensor, reduction: str = "mean") -> Tensor:
    """The mean of both directions' cross-entropies of logit_scale * t_i . v_j, in float32 or float64."""
    dtype = wide(video.dtype)
    logits = logit_scale * (video.to(dtype) @ text.to(dtype).T)
    own = torch.eye(video.shape[0], dtype=torch.bool, device=video.device)
    return _reduced((cross_entropy(logits, own, 0) + cross_entropy(logits, own, 1)) / 2, reduction)


def ego_nce_loss_reference(
    video: Tensor, text: Tensor, positives: Tensor, temperature: float | Tensor, reduction: str = "mean"
) -> Tensor:
    """positives: bool [N, N], rows = videos; every pair is a positive of its own. Both directions' cross-entropies of the
    cosines over the temperature, added."""
    dtype = wide(video.dtype)
    x = unit_rows(video.to(dtype)) @ unit_rows(text.to(dtype)).T / temperature
    positive = positives | torch.eye(video.shape[0], dtype=torch.bool, device=video.device)
    return _reduced(cross_entropy(x, positive, 0) + cross_entropy(x, positive, 1), reduction)


def cross_entropy(logits: Tensor, positive: Tensor, dim: int) -> Tensor:
    """-log(sum of exp over the positives / over all) along a dimension; positive: bool, of the logits' shape.

    Computed as log(1 + the others / the positives). The difference of two log-sum-exps near 20 is off by 2e-6 in float32, and
    that of a probability from 1 by 6e-8: as much as a trained batch still costs.
    """
    others, own = logits.masked_fill(positive, -torch.inf), logits.masked_fill(~positive, -torch.inf)
    # Beyond the threshold log(1 + exp(x)) is x, to the last bit of float64.
    return softplus(others.logsumexp(dim) - own.logsumexp(dim), threshold=50)


def _reduced(entries, reduction):
    return entries if reduction == "none" else entries.sum() / max(len(entries), 1)
