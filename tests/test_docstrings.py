"""What every public name of the ops and the losses says: what it takes, what it raises, where it comes from."""

import inspect
import re

import pytest

from evaat_fast import losses, ops

MODULES = (ops, losses, losses.avion, losses.lavila, losses.egovlp, losses.open_clip)
# Of those that take something.
PUBLIC = [(m, name) for m in MODULES for name in m.__all__ if inspect.signature(getattr(m, name)).parameters]


@pytest.mark.parametrize("module,name", PUBLIC, ids=lambda x: x if isinstance(x, str) else x.__name__.split(".")[-1])
def test_public_names_say_what_they_take_raise_and_come_from(module, name):
    public = getattr(module, name)
    text = public.__doc__ or ""
    for part in ("Args", "Raises", "Source") if inspect.isclass(public) else ("Args", "Returns", "Raises", "Source"):
        assert re.search(rf"\b{part}(, \w+)*:", text), f"{name}: its docstring has no {part}"
    source = re.search(r"^ +Source: .*(arXiv|IJCV|SMS-Loss code|as `)", text, re.M)
    assert source, f"{name}: expected a paper, the authors' code or another function as its source"


@pytest.mark.parametrize("module,name", PUBLIC, ids=lambda x: x if isinstance(x, str) else x.__name__.split(".")[-1])
def test_every_parameter_is_named(module, name):
    """Or the docstring refers to the function that names it."""
    public = getattr(module, name)
    text = public.__doc__
    for parameter in inspect.signature(public).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert re.search(rf"\b{parameter.name}\b", text) or re.search("as (for )?`", text), f"{name}: {parameter.name}"
