"""Registers a kernel's body as a torch operator, so that torch.compile and export see it, and lets eager calls bypass it.

`define` + `impl` + `register_fake` with the autograd.Function outside costs 3 us a call where `torch.library.custom_op` costs
16, and calling the body itself costs none of them. A body's last argument may be a frozen dataclass: the operator's schema has
its fields one by one, and this file alone takes it apart and puts it together.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core.tensor import PLAIN, keeps_numbers_elsewhere

_LIBRARY = torch.library.Library("evaat_fast", "DEF")
# Non-zero under FakeTensorMode, FlopCounterMode and the like, which must see the operator. A private name, hence the getattr.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# torch.jit.is_tracing asks this, after questions of its own that take longer.
_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    tuple[int, ...]: "SymInt[]",
    float: "float",
    bool: "bool",
    str: "str",
}


def traced(*classes: type) -> bool:
    """Whether a call of tensors of these classes must pass through torch's dispatcher, where a compiler, a tracer, a mode or a
    wrapper sees it; else an operator's body may be called as it is."""
    seen = torch.compiler.is_compiling() or _modes() > 0 or _tracing()
    return seen or (not PLAIN.issuperset(classes) and any(map(keeps_numbers_elsewhere, classes)))


class Operator:
    """A body and the torch operator that it is registered as: `at(traced(...))(*arguments)` calls the one or the other."""

    def __init__(self, body: Callable, op: Callable, paths: tuple[tuple[str, ...], ...] | None):
        self.body, self.op, self._paths = body, op, paths

    def at(self, traced: bool) -> Callable:
        return self.dispatched if traced else self.body

    def dispatched(self, *arguments: Any) -> Any:
        if self._paths is None:
            return self.op(*arguments)
        *tensors, settings = arguments
        return self.op(*tensors, *(_field(settings, path) for path in self._paths))


def register(schema: str, fake: Callable, settings: type | None = None) -> Callable[[Callable], Operator]:
    """Decorator: registers the body under `schema` with `fake` as its shape function.

    Args:
        schema: "name(Tensor x, int n, {settings}) -> Tensor"; settings stand last.
        fake: takes what the body takes. Arguments of both are passed by position.
        settings: the frozen dataclass that the body's last argument is, nested ones included; None: it has none.

    The body may read data pointers: it never sees fake tensors.
    """
    name = schema.split("(")[0]
    fields = [] if settings is None else list(_fields(settings))
    count = len(fields)

    def gathered(function):
        if settings is None:
            return function
        return lambda *flat: function(*flat[: len(flat) - count], _made(settings, iter(flat[len(flat) - count :])))

    def decorate(body):
        listed = ", ".join(f"{kind} {'_'.join(path)}" for path, kind in fields)
        _LIBRARY.define(schema.format(settings=listed), tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, gathered(body), "CompositeExplicitAutograd")
        torch.library.register_fake(f"evaat_fast::{name}", gathered(fake), lib=_LIBRARY)
        op = getattr(torch.ops.evaat_fast, name).default
        return Operator(body, op, None if settings is None else tuple(path for path, _ in fields))

    return decorate


def once_differentiable(backward: Callable) -> Callable:
    """Decorates a backward pass that has no derivative of its own. Where there would be one, create_graph=True is an error at
    once: torch's decorator of the name lets autograd.grad pass by its error, and a gradient penalty would silently be none."""

    def checked(ctx, *grads):
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        if twice and any(x is not None and x.requires_grad for x in (*grads, *ctx.saved_tensors)):
            raise RuntimeError(
                "a kernel has no double backward, which create_graph=True and torch.func's transforms ask for; use "
                'backend="reference", in a model EVAAT_FAST_BACKEND=reference'
            )
        return backward(ctx, *grads)

    return checked


def flat(settings: Any) -> list:
    """The operator's arguments that stand for a dataclass: what `opcheck` and FLOP formulas see."""
    return [_field(settings, path) for path, _ in _fields(type(settings))]


def _fields(settings: type, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of names, schema type) of every field."""
    kinds = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind, path = kinds[field.name], (*above, field.name)
        if dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type, kind), path)
        else:
            yield path, _SCHEMA[kind]


def _field(settings, path):
    for name in path:
        settings = getattr(settings, name)
    return settings


def _made(settings: type, values: Iterator) -> Any:
    kinds, parts = typing.get_type_hints(settings), []
    for field in dataclasses.fields(settings):
        kind = kinds[field.name]
        value = _made(typing.cast(type, kind), values) if dataclasses.is_dataclass(kind) else next(values)
        parts.append(tuple(value) if isinstance(value, list) else value)
    return settings(*parts)
