"""Tensors whose memory is not what it seems: every op reads them rightly or says why not, and never crashes."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from evaat_fast import ops
from evaat_fast.ops import IndexedRelevancy

GRID, N = (2, 2, 2), 9


def heads():
    return torch.randn(1, 2, N, 16)


def features():
    return torch.randn(8, 16)


def clip():
    return torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8)


# op -> (a call of one tensor, what makes the tensor)
OPS = {
    "rope3d": (lambda x, **o: ops.rope3d(x, None, GRID, **o), heads),
    "rope3d_": (lambda x, **o: ops.rope3d_(x, None, GRID, **o), heads),
    "rope3d_qkv_": (lambda x, **o: ops.rope3d_qkv_(x, 1, GRID, **o), lambda: torch.randn(1, N, 48)),
    "joint_attention": (lambda x, **o: ops.joint_attention(x, x * 2, x * 3, grid=GRID, **o), heads),
    "joint_attention_qkv_": (lambda x, **o: ops.joint_attention_qkv_(x + 0, 1, GRID, **o), lambda: torch.randn(1, N, 48)),
    "sms_loss": (lambda x, **o: ops.sms_loss(x, x * 2, x[:, :8], **o), features),
    "mi_mm_loss": (lambda x, **o: ops.mi_mm_loss(x, x * 2, **o), features),
    "adaptive_mi_mm_loss": (lambda x, **o: ops.adaptive_mi_mm_loss(x, x * 2, x[:, 0].detach(), **o), features),
    "clip_loss": (lambda x, **o: ops.clip_loss(x, x * 2, x[0, 0].detach(), **o), features),
    "patchify": (lambda x, **o: ops.patchify(x, 16, [1, 2, 3], [1, 2, 3], **o), clip),
}
every_op = pytest.mark.parametrize("call,make", OPS.values(), ids=OPS)
with_gradients = pytest.mark.parametrize("call,make", [v for k, v in OPS.items() if k != "patchify"], ids=[*OPS][:-1])


@every_op
def test_meta(call, make):
    assert call(make().to("meta")).device.type == "meta"
    why = "'cpu' was asked for but cannot serve this call: (.* takes CPU tensors, not meta|no cpu version of joint_attention)"
    with pytest.raises(RuntimeError, match=why):
        call(make().to("meta"), backend="cpu")


@every_op
def test_fake_tensor_outside_its_mode(call, make):
    fake = FakeTensorMode().from_tensor(make())
    assert call(fake).shape == call(make()).shape


@every_op
def test_wrapper_subclass(call, make):
    x = make()
    out = call(TwoTensor(x.clone(), x.clone()))
    assert isinstance(out, TwoTensor) and torch.equal(out.a, call(x)) and torch.equal(out.b, out.a)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_op
def test_torchscript_traces_what_is_computed(call, make):
    """A body that reads memory leaves no trace: an eager call would have been recorded as a constant."""
    with torch.no_grad():
        traced = torch.jit.trace(call, make(), check_trace=False)
        x = make() if make is clip else make() * 2
        assert torch.equal(traced(x.clone()), call(x.clone()))


@every_op
def test_plain_subclass_and_parameter(call, make):
    class Named(torch.Tensor):
        pass

    x = make()
    expected = call(x.clone())
    assert torch.equal(call(x.clone().as_subclass(Named)).as_subclass(torch.Tensor), expected)
    if x.is_floating_point():
        with torch.no_grad():
            assert torch.equal(call(torch.nn.Parameter(x.clone())), expected)


@with_gradients
def test_torch_func_and_forward_mode_are_refused(call, make):
    x = make()
    for transformed in (
        lambda: torch.func.grad(lambda y: call(y).sum())(x),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.vmap(call)(x[None]),
    ):
        with pytest.raises(NotImplementedError, match="has no vmap rule, nor any for torch.func's grad and jvp"):
            transformed()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        call(x)


@pytest.mark.parametrize("name", ["rope3d", "sms_loss", "mi_mm_loss"])
def test_lazy_negation_and_zeros(name):
    call, make = OPS[name]
    x = make()
    torch.testing.assert_close(call(torch._neg_view(x)), call(-x))
    torch.testing.assert_close(call(torch._efficientzerotensor(x.shape)), call(torch.zeros_like(x)))


def test_lazy_negation_of_labels():
    video, text = features(), features()
    labels = torch.randn(8, 8, dtype=torch.complex64).conj().imag
    index = torch.arange(8)
    assert labels.is_neg()
    expected = ops.sms_loss(video, text, labels.clone())
    assert torch.equal(ops.sms_loss(video, text, labels), expected)
    assert torch.equal(ops.sms_loss(video, text, IndexedRelevancy(labels, index, index)), expected)


@pytest.mark.parametrize("name", ["rope3d_", "rope3d_qkv_"])
def test_lazy_tensors_in_place(name):
    call, make = OPS[name]
    with pytest.raises(ValueError, match="in place needs a tensor with memory of its own"):
        call(torch._neg_view(make()))


@pytest.mark.parametrize("name", ["rope3d", "rope3d_", "rope3d_qkv_", "mi_mm_loss", "patchify"])
def test_sparse(name):
    call, make = OPS[name]
    with pytest.raises(TypeError, match="expected a dense tensor, got a sparse_coo one"):
        call(make().to_sparse())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["sms_loss", "mi_mm_loss", "adaptive_mi_mm_loss", "clip_loss"])
def test_one_pair_that_is_not_finite(name, backend):
    x = [torch.full((1, 4), torch.nan, requires_grad=True) for _ in range(2)]
    extra = {"sms_loss": (torch.ones(1, 1),), "adaptive_mi_mm_loss": (torch.ones(1),), "clip_loss": (2.0,)}.get(name, ())
    loss = getattr(ops, name)(*x, *extra, backend=backend)
    assert loss == 0 and all(not g.any() for g in torch.autograd.grad(loss, x))


MAKERS = (
    lambda dtype: torch.empty(3, 4, dtype=dtype),
    lambda dtype: torch.empty_like(torch.zeros(3, 4, dtype=dtype)),
    lambda dtype: torch.empty_strided((3, 4), (1, 3), dtype=dtype),
    lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3, 4),
    lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((3, 4), (4, 1)),
)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", "float32 bfloat16 complex64 int64 int32 int16 int8 uint8 bool".split())
def test_unwritten_memory_shows(make, dtype):
    """A sum, a comparison with what was meant and an index must all fail."""
    dtype = getattr(torch, dtype)
    x = make(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        assert x.isnan().all()
    elif dtype == torch.bool:
        assert x.any() and not x.all()
    elif dtype == torch.uint8:
        assert (x == 165).all()
    else:
        assert (x < -40).all()
        with pytest.raises(IndexError):
            torch.zeros(30)[x.long()]
