"""A training step: what it is given, in which order it runs beside the copies, and that it waits for nothing."""

import contextlib

import pytest
import torch

from evaat_fast.train import evaluation, inputs, steps, trainer
from evaat_fast.train.masters import Masters

pytest.importorskip("decord")
pytest.importorskip("tokenizers")


def batches(config, epoch=0):
    data = inputs.splits(config).train
    data.set_epoch(epoch)
    sampler = inputs.sampler(config, data)
    sampler.epoch = epoch
    return list(inputs.loader(config, data, sampler, inputs.tokenizer(config), torch.device("cpu")))


def test_patches_are_dropped_in_training_alone(configure):
    """Other ones for each clip and in each epoch, the same for the same seed; the batches are else what they were."""
    first, again, later = (batches(configure("model.patch_dropout=0.5"), epoch) for epoch in (0, 0, 1))
    for batch, same, next_epoch, plain in zip(first, again, later, batches(configure()), strict=True):
        patches = batch.pop("patches")
        assert patches.shape == (16, 4) and 0 <= patches.min() and patches.max() < 8
        assert len(patches.unique(dim=0)) > 4
        assert torch.equal(patches, same["patches"]) and not torch.equal(patches, next_epoch["patches"])
        assert batch.keys() == plain.keys() and all(torch.equal(x, plain[name]) for name, x in batch.items())
    config = configure("model.patch_dropout=0.5")
    model, test = trainer.build_model(config).train(), inputs.test_split(config)
    shown = [evaluation.embed(model, test, c, torch.device("cpu"), "ordered") for c in (config, configure())]
    assert torch.equal(*shown)


def test_texts_of_a_graph_have_few_lengths(configure):
    plain, padded = batches(configure()), batches(configure("train.cuda_graph=true"))
    for a, b in zip(plain, padded, strict=True):
        length = a["text"].shape[1]
        assert b["text"].shape[1] == -(-length // 16) * 16
        assert torch.equal(b["text"][:, :length], a["text"]) and not b["text"][:, length:].any()


class Streams:
    """Stands for torch.cuda's streams and events: what a step does with them, in order."""

    def __init__(self, monkeypatch):
        self.said, self.current = [], "compute"
        recorder = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                recorder.said.append(f"{self.name} waits for {other.name}")

        @contextlib.contextmanager
        def stream(entered):
            before, recorder.current = recorder.current, entered.name
            yield
            recorder.current = before

        self.copies = Stream("copies")
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.current))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.said.append(f"{s.name} reads"))
        move = torch.Tensor.to

        def to(x, *args, **options):
            if options.get("non_blocking") and x.ndim:  # no scalar of the optimiser's
                self.said.append(f"copied on {self.current}")
            return move(x, *args, **options)

        monkeypatch.setattr(torch.Tensor, "to", to)


def test_a_batch_is_copied_beside_the_step_before(configure, monkeypatch):
    """The stream of copies never waits for the one that computes, which waits for the copies before it reads."""
    config = configure()
    batch = batches(config)[0]
    model = trainer.build_model(config)
    optimizer, table = steps.build_optimizer(model, config), torch.eye(batch["kind"].max() + 1)
    run = steps.Steps(Masters(model), optimizer, table, config, torch.device("cpu"))
    streams = Streams(monkeypatch)
    run.copies = streams.copies
    monkeypatch.setattr(steps, "batch_loss", lambda model, *_: streams.said.append("computes") or model.logit_scale * 1)
    model.logit_scale.requires_grad_()
    for _ in range(2):
        run(batch)
    names = len(batch)
    once = [*["copied on copies"] * names, "compute waits for copies", *["compute reads"] * names, "computes"]
    assert streams.said == once * 2


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"], ids=["eager", "graph"])
@pytest.mark.parametrize("loss", ["clip", "sms"])
def test_a_step_waits_for_nothing(configure, graph, loss):
    """From the batch in pinned memory to the loss on its way to the host."""
    options = (f"loss.name={loss}", "loss.learnable_temperature=true", "optim.clip_norm=1", "model.patch_dropout=0.5")
    config = configure(*options, "train.device=cuda", f"train.cuda_graph={graph}")
    device, data = torch.device("cuda"), inputs.splits(config).train
    model = trainer.build_model(config).to(device).train()
    optimizer = steps.build_optimizer(model, config)
    steps.fit_optimizer(optimizer, config, device)
    run = steps.Steps(Masters(model), optimizer, data.relevancy_table, config, device)
    batch = {name: x.pin_memory() for name, x in batches(config)[0].items()}
    for _ in range(3):
        first = run(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = []
        for step in range(3):
            run.set_lr(1e-3 * step)
            losses.append(steps.later(run(batch)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(abs(loss() - first.item()) < 10 for loss in losses)
