"""The one tolerance rule, for every op, backend, dtype and gradient."""

import torch


def close(ours, low, truth, what="output"):
    """Holds `ours` to the error that plain torch makes in the same dtype.

    ours: the kernel's result; low: the reference's result in the kernel's dtype; truth: the reference's in float64.
    max|ours - truth| <= 2 max|low - truth| + 2 max|(low + 0.3 - 0.3) - low|, and rms(ours - truth) <= 1.1 rms(low - truth).
    """
    assert ours.dtype == low.dtype, f"{what}: dtype {ours.dtype}, expected {low.dtype}"
    assert ours.shape == low.shape == truth.shape, f"{what}: shape {ours.shape}, expected {truth.shape}"
    if ours.numel() == 0:
        return
    truth = truth.double()
    rounding = ((low + 0.3 - 0.3) - low).double().abs().max()
    # Of a handful of elements that may find none that rounds: at least half a unit in the last place of the largest.
    rounding = rounding.clamp(min=torch.finfo(low.dtype).eps / 2 * low.double().abs().max())
    error, allowed = (ours.double() - truth).abs(), 2 * (low.double() - truth).abs().max() + 2 * rounding
    worst = error.flatten().argmax()
    place = [int(i) for i in torch.unravel_index(worst, error.shape)]
    assert torch.isfinite(error).all(), f"{what}: not finite at {place}"
    assert error.flatten()[worst] <= allowed, (
        f"{what}{place}: ours {ours.flatten()[worst]} torch {low.flatten()[worst]} truth {truth.flatten()[worst]}; "
        f"error {error.max():.3e} > {allowed:.3e}"
    )
    rms, rms_low = error.square().mean().sqrt(), (low.double() - truth).square().mean().sqrt()
    # Where torch is exact or nearly so, a 16th of one rounding of the dtype is allowed: float32 sums differ in their order.
    floor = torch.finfo(ours.dtype).eps / 16 * truth.square().mean().sqrt()
    # Both are estimates, of n errors uncertain by 1/sqrt(2n): too much for a few, and worth a margin below a thousand.
    n = int(truth.count_nonzero())
    if n < 64:
        return
    most = 1.1 if n >= 1000 else 1.1 * (1 + 3 / (2 * n) ** 0.5)
    assert rms <= most * rms_low + floor, f"{what}: rms error {rms:.3e} > {most:.2f} x torch's {rms_low:.3e}"


def on_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def launched(call):
    """The names of the kernels that a call launches on a GPU, in order; fills and copies of memory are none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    names = (e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [name for name in names if not name.lower().startswith(("mem", "activity buffer"))]
