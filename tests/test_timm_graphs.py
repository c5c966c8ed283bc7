"""What timm's own models can be made into, an accelerated one can: TorchScript, torch.fx, torch.export and torch.compile."""

import io
import pickle

import peers
import pytest
import test_timm_norms
import torch
from test_timm import CLOSE, counted, image, make, run

from evaat_fast.integrations import timm as integration


@pytest.fixture(autouse=True)
def poisoned_empty():
    """TorchScript and Dynamo compile what torch.empty is: here it stays torch's."""


def scripted(model, x):
    return saved_and_loaded(torch.jit.script(model))


def traced(model, x):
    return saved_and_loaded(torch.jit.trace(model, x))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


def symbolic(model, x):
    return torch.fx.symbolic_trace(model)


def features(model, x):
    """timm's own use of torch.fx, and a pickle of what it makes."""
    layers = peers.peer("timm.layers")
    nodes = layers.get_graph_node_names(model)[1]
    graph = pickle.loads(pickle.dumps(layers.create_feature_extractor(model, [nodes[-1]])))
    return lambda x: graph(x)[nodes[-1]]


def symbolic_scripted(model, x):
    return saved_and_loaded(torch.jit.script(torch.fx.symbolic_trace(model)))


def exported(model, x):
    return torch.export.export(model, (x,)).module()


# The first two have the one and the other of timm's classes.
NAMES = (
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
    pytest.param("vit_small_patch16_dinov3", marks=pytest.mark.slow),
)
OURS = (symbolic, features, exported)
THEIRS = (scripted, traced, symbolic_scripted)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", [*OURS, *THEIRS], ids=lambda f: f.__name__)
def test_graphs(transform, name):
    """What timm's own models can be made into, an accelerated one can: with our operators, or, to be saved, with timm's."""
    model, x = make(name, depth=2).eval(), image(name)
    with torch.no_grad():
        expected = model(x)
        graph = transform(integration.accelerate(model), x)
        out, calls = counted(graph, x)
    assert calls >= 2 if transform in OURS else calls == 0
    torch.testing.assert_close(out, expected, **CLOSE)
    assert counted(model, x)[1] >= 2, "the model itself is as it was"


def test_compiles():
    model, x = make(depth=2), image(batch=1)
    expected, ours = run(model, x), set()

    def backend(graph, inputs):
        targets = {node.target for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes}
        ours.update(t for t in targets if getattr(t, "namespace", "") == "evaat_fast")
        return graph.forward

    integration.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected[0], **CLOSE)
    assert ours
    for a, b in zip(run(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", [test_timm_norms.NORMED, test_timm_norms.PACKED])
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_blocks(name):
    """With rows enough for ours in eager mode, what takes a graph of a block takes timm's, to the names of its nodes."""
    model, x = test_timm_norms.make(name).eval(), test_timm_norms.image(name)
    layers, parts = peers.peer("timm.layers"), [f"blocks.0.{part}" for part in ("norm2", "mlp.act", "mlp.norm")]
    with torch.no_grad():
        expected, inside = model(x), layers.create_feature_extractor(model, parts)(x)
        integration.accelerate(model)
        ours = layers.create_feature_extractor(model, parts)(x)
        assert list(ours) == list(inside)
        for part in inside:
            torch.testing.assert_close(ours[part], inside[part], **CLOSE)
        for transform in (*OURS[::2], *THEIRS):
            torch.testing.assert_close(transform(model, x)(x), expected, rtol=1e-4, atol=1e-4)
    expected = run(model, x)
    ours = run(torch.compile(model, backend="eager", fullgraph=True), x)
    test_timm_norms.assert_near(ours, expected)
