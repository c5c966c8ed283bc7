"""The meta device and torch's default device, for each of the towers named as arguments; prints those that pass.

A script, since the tests' torch.empty is not torch's, and a device's context knows torch's alone.
"""

import sys

import torch
from foreign import equal, ours

from evaat_fast.data.transforms import eval_transform, train_transform
from evaat_fast.model import EVA02AT, CLIPTokenizer, draw_patches


def inputs(model):
    text = torch.randint(1, 80, (2, 20))
    text[:, 9] = 89
    return torch.randint(0, 256, (2, 4, *model.config.size, 3), dtype=torch.uint8), text


@torch.no_grad()
def meta(model):
    """A model made without memory, which takes a state dict's own tensors."""
    with torch.device("meta"):
        empty = EVA02AT(model.config).eval()
    assert all(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    state = model.state_dict()
    empty.load_state_dict(state, assign=True)
    assert not any(x.is_meta for x in (*empty.parameters(), *empty.buffers())) and equal(empty.state_dict(), state)
    assert empty.visual.cls_token.data_ptr() == state["visual.cls_token"].data_ptr()
    video, text = inputs(model)
    expected = model(video, text)
    for key, value in empty(video, text).items():
        assert torch.equal(expected[key], value), key


@torch.no_grad()
def default(model):
    """Of all that is made on the way nothing is made where torch's default device is: a model on the CPU stays there. One that
    is made then lies there."""
    video, text = inputs(model)
    expected = model(video, text)
    torch.set_default_device("meta")
    made = [draw_patches(2, model.config.grid, 0.5)]
    out = model(video, text)
    if model.config.tower != "timesformer":
        made.append(model.encode_video(video, patches=made[0]))
    made += [transform(32)(video[0]) for transform in (eval_transform, train_transform)]
    made.append(CLIPTokenizer(20)("a plate"))
    other = EVA02AT(model.config)
    torch.set_default_device(None)
    assert all(torch.equal(out[key], expected[key]) for key in out)
    assert all(x.device.type == "cpu" for x in made)
    assert all(x.is_meta for x in (*other.parameters(), *other.buffers()))


if __name__ == "__main__":
    for tower in sys.argv[1:]:
        model = ours(tower)
        meta(model)
        default(model)
        print(tower)
