"""A training step, both towers, loss and optimiser, against what others run: python bench/train.py

All stacks train the same weights on the same batch under bf16 autocast (float32 on a CPU) with fused AdamW; AVION's is a plain
ViT of the same width. "bf16 params" has no autocast: the weights of products are bf16, and AdamW updates float32 masters.
"authors" is EVA02-AT as its authors run it, built here of the same parameters: two eager rotations of queries and keys, SDPA,
torch's layer norms, every row of the last block, CLIP loss in torch. The rows between it and ours change one thing each. A
stack's loss and gradients are held to the authors' before it is timed.

A row has clips a second, MFU (the share of the matmul rate of the same run that the model's products need: 6 FLOP a parameter
and token, 12 N^2 C a layer and clip), and the memory at the peak of the step. --where profiles the steps and --largest looks
for the largest batch, both after everything is timed, as a profiler slows down what follows; with --append they add to the
rows of an earlier run of the same commit and device.
"""

import argparse
import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import largest
import rope3d
import store
import torch
import torch.nn.functional as F
import where
from timing import peaks, quantiles
from torch import nn

import evaat_fast
from evaat_fast import ops
from evaat_fast.train.masters import Masters


@dataclass(frozen=True)
class Stack:
    """What of the step is ours; with none of it, the authors'."""

    attention: bool = True  # rotation in place and SDPA on the packed projection; of the class token alone in the last block
    norms: bool = True
    loss: bool = True
    plain: bool = False  # a ViT instead of EVA-02
    held: bool = False  # matrices in bfloat16 with float32 masters, instead of autocast
    compiled: bool = False
    graph: bool = False


AUTHORS = Stack(attention=False, norms=False, loss=False)
STACKS = {
    "authors, eager": AUTHORS,
    "+ our attention": dataclasses.replace(AUTHORS, attention=True),
    "+ our norms": dataclasses.replace(AUTHORS, attention=True, norms=True),
    "ours, eager": Stack(),
    "ours, CUDA graph": Stack(graph=True),
    "ours, bf16 params": Stack(held=True),
    "ours, bf16 params, graph": Stack(held=True, graph=True),
    "authors, compiled": dataclasses.replace(AUTHORS, compiled=True),
    "ours, compiled": Stack(compiled=True),
    "AVION, eager": dataclasses.replace(AUTHORS, plain=True),
    "AVION, compiled": dataclasses.replace(AUTHORS, plain=True, compiled=True),
}
BASE, LARGE = "eva02_at_base_patch16_224", "eva02_at_large_patch14_224"
CPU_SHAPES = [{"model": BASE, "B": 2, "T": 4}]
GPU_SHAPES = [{"model": m, "B": B, "T": T} for m, B, T in ((BASE, 64, 4), (BASE, 16, 16), (LARGE, 32, 4), (LARGE, 8, 16))]
CAPTION = 32  # tokens of the longest one


def norm(x, stream, module, fused):
    """(the norm of stream + x, the sum), as the op or as torch has it under autocast."""
    if fused:
        return ops.add_norm(x, stream, module.weight, module.bias, module.eps)
    total = x if stream is None else stream + x
    return module(total), total


class VisionBlock(nn.Module):
    """An EVA-02 block of the model, with its own parameters, as a stack runs it."""

    def __init__(self, block, stack, last):
        super().__init__()
        self.block, self.stack, self.last = block, stack, last and stack.attention

    def forward(self, x, stream, grid, freqs, **biases):
        block, fused = self.block, self.stack.norms
        if fused and self.stack.attention:
            return block(x, stream, grid, freqs, self.last, **biases)
        x, stream = norm(x, stream, block.norm1, fused)
        out = (self.ours if self.stack.attention else self.published)(x, grid, freqs)
        x = block.attn.proj(norm(out.transpose(1, 2).flatten(2), None, block.attn.norm, fused)[0])
        x, stream = norm(x, stream[:, :1] if self.last else stream, block.norm2, fused)
        gate, value = block.mlp.fc1(x).chunk(2, -1)
        return block.mlp.fc2(norm(F.silu(gate) * value, None, block.mlp.norm, fused)[0]), stream

    def qkv(self, x):
        attn = self.block.attn
        return F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias)))

    def ours(self, x, grid, freqs):
        heads = self.block.attn.heads
        if not self.last:
            return ops.joint_attention_qkv_(self.qkv(x), heads, grid, freqs=freqs)
        q, k, v = self.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return ops.joint_attention(q[:, :, :1], ops.rope3d(k, grid=grid, freqs=freqs), v)

    def published(self, x, grid, turn):
        q, k, v = self.qkv(x).unflatten(2, (3, self.block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(turn(q), turn(k), v)


class PlainBlock(nn.Module):
    """A ViT's block: torch's attention without rotation, a GELU of four times the width."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, stream, grid, freqs):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), None


class TextBlock(nn.Module):
    def __init__(self, block, stack):
        super().__init__()
        self.block, self.stack = block, stack

    def forward(self, x, stream, **biases):
        if self.stack.norms:
            return self.block(x, stream, **biases)
        x, stream = norm(x, stream, self.block.ln_1, self.stack.norms)
        x, stream = norm(self.block.attn(x), stream, self.block.ln_2, self.stack.norms)
        return self.block.mlp(x), stream


class Step(nn.Module):
    """loss(video, tokens) of a model as a stack runs it."""

    def __init__(self, model, stack):
        super().__init__()
        self.model, self.stack, visual = model, stack, model.visual
        config = model.config
        if stack.plain:
            blocks = [PlainBlock(config.vision_width, config.vision_heads) for _ in visual.blocks]
            visual.blocks = nn.ModuleList()
        else:
            blocks = [VisionBlock(block, stack, block is visual.blocks[-1]) for block in visual.blocks]
        self.vision = nn.ModuleList(blocks).to(visual.cls_token.device)
        self.text = nn.ModuleList(TextBlock(block, stack) for block in model.text.transformer.resblocks)
        if stack.compiled:
            for block in (*self.vision, *self.text):
                block.compile(dynamic=False)

    def run(self, blocks, x, *arguments):
        """(branch, stream) of x after blocks. Ours leave a bias to the next one, as in the towers, where no compiler stands
        between them."""
        leaves, stream, given = self.stack.attention and self.stack.norms and not self.stack.compiled, None, None
        for block in blocks:
            left = block.block.left(x) if leaves and block is not blocks[-1] else None
            x, stream = block(x, stream, *arguments, **({"given": given, "left": left} if leaves else {}))
            given = left
        return x, stream

    def encode_video(self, video):
        """As VisionTransformer.forward."""
        visual = self.model.visual
        x = visual.patch_embed(video)
        spatial = visual.pos_embed[:, 1:].unsqueeze(1) + visual.temporal_embed.unsqueeze(2)
        cls = (visual.cls_token + visual.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = x + spatial.flatten(1, 2)
        x = torch.cat((cls.to(x.dtype), x), 1)
        grid, rope = visual.config.grid, visual.freqs
        if not self.stack.attention:  # the rotation as published, its tables made once
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            scale = (1.0, *(visual.config.rope_grid / side for side in grid[1:]))
            rope = rope3d.published(grid, 2 * rope.shape[-1], dtype, x.device, scale)
        x, stream = self.run(self.vision, x, grid, rope)
        x, stream = x[:, 0], None if stream is None else stream[:, 0]
        return visual.head(norm(x, stream, visual.norm, self.stack.norms)[0])

    def encode_text(self, tokens):
        text = self.model.text
        x, stream = self.run(self.text, text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]])
        end = torch.arange(len(x), device=x.device), tokens.argmax(-1)
        return norm(x[end], stream[end], text.ln_final, self.stack.norms)[0] @ text.text_projection

    def forward(self, video, tokens):
        video, text = (F.normalize(x.float(), dim=-1) for x in (self.encode_video(video), self.encode_text(tokens)))
        scale = self.model.logit_scale.exp()
        if self.stack.loss:
            return ops.clip_loss(video, text, scale)
        logits, target = scale * video @ text.T, torch.arange(len(video), device=video.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def flop(config, B, plain):
    """Of the products of a step, which are 3 times those of the forward pass."""
    T, Hp, Wp = config.grid
    N, width = 1 + T * Hp * Wp, config.vision_width
    mlp = 8 * width**2 if plain else 3 * width * config.vision_mlp
    vision = config.vision_layers * (N * (4 * width**2 + mlp) + 2 * N * N * width)
    vision += (N - 1) * 3 * config.patch_size**2 * width
    L, text = CAPTION, config.text_width
    return 6 * B * (vision + config.text_layers * (12 * L * text**2 + L * L * text))


class Training:
    """One stack's model, optimiser and batch. `step` trains once."""

    def __init__(self, shape, stack, device, precision):
        torch.manual_seed(0)
        model = evaat_fast.create_model(shape["model"], num_frames=shape["T"])
        self.config, size = model.config, model.config.image_size
        generator = torch.Generator().manual_seed(1)
        B, T = shape["B"], shape["T"]
        self.video = torch.randint(0, 256, (B, T, size, size, 3), dtype=torch.uint8, generator=generator).to(device)
        tokens = torch.randint(1, self.config.vocab_size - 1, (B, CAPTION), generator=generator)
        tokens[:, -1] = self.config.vocab_size - 1
        self.tokens, self.device, self.stack = tokens.to(device), device, stack
        model.to(device)
        self.masters = Masters(model, torch.bfloat16 if stack.held else None)
        self.low = precision == "bf16" and not stack.held
        self.loss = Step(model, stack)
        self.parameters = list(self.masters.parameters.values() if stack.held else self.loss.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True, capturable=stack.graph)
        self.replay = None
        if stack.graph:
            self.capture()

    def gradients(self):
        """Sets them, and returns the loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
            loss = self.loss(self.video, self.tokens)
        loss.backward()
        self.masters.take_gradients()
        return loss.detach()

    def update(self):
        self.optimizer.step()
        self.masters.give_weights()

    def step(self):
        if self.replay is not None:
            return self.replay()
        self.optimizer.zero_grad()
        loss = self.gradients()
        self.update()
        return loss

    def capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # on which weights are cast and batches made
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            loss = self.gradients()
            self.update()
        self.replay = lambda: (graph.replay(), loss)[1]

    def drop(self):
        """Lets go of the graph, the gradients, and all but the first clip."""
        self.replay = None
        self.optimizer.zero_grad()
        self.loss.zero_grad()  # also of matrices whose masters the optimiser has, where a step was cut off
        self.video, self.tokens = self.video[:1].clone(), self.tokens[:1].clone()

    def resize(self, B):
        """Another batch: the first clip repeated, as memory does not depend on what is in it."""
        self.drop()
        self.video, self.tokens = (x.repeat(B, *(1 for _ in x.shape[1:])) for x in (self.video, self.tokens))
        if self.stack.graph:
            self.capture()


def check(ours, authors):
    """Loss and gradients of the first step, of the same weights and batch."""
    loss, grads = ours
    assert abs(loss - authors[0]) <= 1e-2 * abs(authors[0]), f"loss {loss} for {authors[0]}"
    for name in ("visual.blocks.0.attn.qkv.weight", "visual.blocks.0.norm1.weight", "text.transformer.resblocks.0.ln_1.bias"):
        error = (grads[name] - authors[1][name]).norm() / authors[1][name].norm()
        assert error <= 5e-2, f"the gradient of {name} differs by {error:.1e} of its size"


def first(training):
    """(loss, gradients) without a step."""
    loss = training.gradients().item()
    names = {name: p.grad.clone() for name, p in training.masters.parameters.items() if p.grad is not None}
    training.optimizer.zero_grad()
    return loss, names


def measure(training, device, seconds):
    """Seconds of each step, and MiB at the peak."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        training.step()
    sync()
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        training.step()
        sync()
        times.append(time.perf_counter() - began)
    return times, torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None


def profiled(record, device, goes_on):
    """Where the time of a record's stack goes; too short to be asked whether it goes on."""
    training = Training(record["shape"], STACKS[record["provider"]], device, record["dtype"])
    for _ in range(2):
        training.step()
    return where.measure(training.step, device, record["ms"]["p50"])


def searched(record, device, goes_on):
    """The largest batch of a record's stack."""
    training = Training({**record["shape"], "B": 1}, STACKS[record["provider"]], device, record["dtype"])
    return largest.search(training, record["shape"]["B"], goes_on)


def add(name, found, records, args, results, goes_on):
    """record[name] = found(...) for the records that were timed and have none, a record written at a time. Graphs come last: a
    capture that lacks memory is what torch may not recover from."""
    for record in sorted(records, key=lambda r: STACKS[r["provider"]].graph):
        if "ms" not in record or name in record or not goes_on():
            continue
        try:
            record[name] = found(record, args.device, goes_on)
        except Exception as error:
            record[name] = {"fail": f"{type(error).__name__}: {error}"[:200]}
        if args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        store.write(args.json, results)
        print(f"  {record['provider']:<22} {name}: {record[name]}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--first", type=int, help="only the first so many shapes")
    parser.add_argument("--only", nargs="*", metavar="STACK", help="of " + "; ".join(STACKS))
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="no stack with such a word in its name")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 autocast on a GPU, fp32 on a CPU by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="spent per stack, at least five steps")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no stack after so many")
    parser.add_argument("--where", action="store_true", help="profile each stack: kernels of a GPU, operators of a CPU")
    parser.add_argument("--largest", action="store_true", help="on a GPU, look for each stack's largest batch")
    parser.add_argument("--append", action="store_true", help="time nothing, add to the rows of the JSON that is there")
    parser.add_argument("--json", type=Path, default=harness.HERE.parent / "build" / "bench" / "train.json")
    args = parser.parse_args(argv)
    device, stop = args.device, time.monotonic() + args.budget
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    shapes = (GPU_SHAPES if device == "cuda" else CPU_SHAPES)[: args.first]
    info = harness.environment(device)
    results = harness.begun(args.json, info) if args.append else {"op": "train", "baseline": "authors, eager"}
    if results is None:
        parser.error(f"--append: {args.json} is not of this commit and device")
    if not args.append:
        results |= {"environment": info, "peak": peaks(device), "records": []}
    peak = results["peak"]
    for shape in [] if args.append else shapes:
        print(f"\n{store.label(shape)}  {precision}")
        authors = base = None
        for name, stack in STACKS.items():
            if name != "authors, eager" and (not chosen(name, args) or time.monotonic() > stop):
                continue
            record = {"shape": shape, "dtype": precision, "mode": "step", "provider": name}
            try:
                if stack.graph and device != "cuda":
                    raise harness.Unavailable("for a GPU")
                if stack.held and precision != "bf16":
                    raise harness.Unavailable("for bf16")
                began = time.perf_counter()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # before the model, as a graph's memory is taken when it is captured
                training = Training(shape, stack, device, precision)
                if authors is None:
                    authors = first(training)
                elif not stack.plain and not stack.graph:
                    check(first(training), authors)
                times, mib = measure(training, device, args.seconds)
                ms = quantiles(times)
                work = flop(training.config, shape["B"], stack.plain)
                base = base or ms["p50"]
                record |= {"ms": ms, "ratio": ms["p50"] / base, "clips_per_s": shape["B"] / ms["p50"] * 1e3}
                record |= {"work": {"flop": work}, "mfu": work / ms["p50"] * 1e3 / peak["matmul_flop_per_s"]}
                record["began_s"] = time.perf_counter() - began - sum(times)
                if mib is not None:
                    record["peak_mib"] = mib
            except Exception as error:
                kind = "absent" if isinstance(error, harness.Unavailable) else "fail"
                record[kind] = f"{type(error).__name__}: {error}"
            training = None
            if device == "cuda":
                torch.cuda.empty_cache()
            results["records"].append(record)
            store.write(args.json, results)
            print(show(record), flush=True)
    authors = None  # whose gradients would be in the way
    rows = [r for r in results["records"] if r["shape"] in shapes and r["provider"] in STACKS and chosen(r["provider"], args)]
    if args.where:
        add("where", profiled, rows, args, results, lambda: time.monotonic() < stop)
    if args.largest and device == "cuda":
        add("largest", searched, rows, args, results, lambda: time.monotonic() < stop)
    elif args.largest:
        print("largest batch: not searched on a CPU, whose memory is shared")
    print(f"\n{len(results['records'])} records in {args.json}")


def chosen(name, args):
    return name in args.only if args.only else not any(word in name for word in args.skip)


def show(record):
    if "ms" not in record:
        return f"  {record['provider']:<22} {next(record[k] for k in ('absent', 'fail') if k in record)[:200]}"
    memory = f"{record['peak_mib'] / 1024:7.1f} GiB" if "peak_mib" in record else ""
    rates = f"{record['ms']['p50']:9.1f} ms {record['clips_per_s']:8.1f} clips/s  MFU {record['mfu']:6.1%}"
    return f"  {record['provider']:<22} {rates} {memory}"


if __name__ == "__main__":
    main()
