"""The pairwise losses written down a second time, dense and in float64: what the tests of every backend compare with."""

import torch


def unit(x):
    norm = x.norm(dim=1, keepdim=True)
    return x / norm.clamp_min(1e-8)


def penalties(x, c, w, margin, relaxation, eps, rule="code"):
    """Both directions of all pairs, concatenated and the diagonals dropped by index.

    x [N, N] similarities with texts in the rows, c [N, N] relevancies with videos in the rows, w [N].
    """
    N = len(x)
    keep = (torch.ones(N, N) - torch.eye(N)).flatten().repeat(2).nonzero().flatten()
    own = x.diag()[:, None].expand(N, N).flatten().repeat(2)[keep]
    other = torch.cat((x.flatten(), x.T.flatten()))[keep]
    d = (w[:, None].expand(N, N).flatten().repeat(2) - torch.cat((c.T.flatten(), c.flatten())))[keep]
    m = margin * d + other - own
    if rule == "code":
        first, equal = d > eps, d.abs() < eps
        near = m
    else:
        first, equal = d >= eps, d.abs() < eps
        near = other - own
    out = torch.zeros_like(m)
    out[first] = m[first].clamp_min(0)
    out[equal] = (near[equal].abs() - relaxation).clamp_min(0)
    rest = ~first & ~equal
    if rule == "charades":  # pairs of a higher label do not count
        out[rest], rest = 0.0, rest & d.isnan()
    out[rest] = (-m[rest]).clamp_min(0)
    return out


def sms(video, text, c, w=None, margin=0.6, relaxation=0.1, eps=None, rule="code"):
    """float64 loss of float64 features; labels are taken as the numbers they are."""
    eps = eps if eps is not None else 1.1 / 240 if rule == "code" else 0.1
    c = c.double()
    w = c.diag() if w is None else w.double()
    return penalties(unit(text) @ unit(video).T, c, w, margin, relaxation, eps, rule).mean()


def clip(video, text, scale):
    logits = scale * text @ video.T
    target = torch.arange(len(video))
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def slopes(x, c, w, margin, relaxation, eps, rule="code", weight=None):
    """The integers dL/dx * 2N(N-1), texts in the rows, where kinks are hit exactly: relu'(0) = sign(0) = 0.

    weight: integers [N], what a term counts by its anchor. clamp_min passes its gradient at the bound, so the slopes are
    written out instead of differentiated.
    """
    N = len(x)
    total = torch.zeros(N, N, dtype=torch.int64)
    for i in range(N):
        for j in range(N):
            for anchor in (i, j) if i != j else ():
                d = float(w[anchor] - c[j, i])
                m = margin * d + float(x[i, j] - x[anchor, anchor])
                near = m if rule == "code" else float(x[i, j] - x[anchor, anchor])
                if abs(d) < eps:
                    g = (near > relaxation) - (near < -relaxation)
                elif d > eps or (rule != "code" and d == eps):
                    g = int(m > 0)
                elif rule == "charades":
                    g = 0
                else:
                    g = -int(m < 0)
                g *= 1 if weight is None else int(weight[anchor])
                total[i, j] += g
                total[anchor, anchor] -= g
    return total


def gradients(loss, *inputs):
    """(loss, gradient of each input) of `loss(*inputs)` on fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = loss(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves)
