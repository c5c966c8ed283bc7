"""The shipped configurations of the GPU kernels: name -> what compiles it for an architecture."""

import functools

import aot

DTYPES = ("bf16", "fp16", "fp32")


def rope3d(arch, dtype, D, interleaved=True, inverse=False, per_head=False):
    import triton
    from evaat_fast.kernels.rope3d import rotate as kernels

    strides = [f"{x}_{d}" for x in ("q", "k", "out_q", "out_k") for d in "bhn"]
    aligned = ["table_half", "table_b", "table_h", *strides]
    pointers = {name: f"*{dtype}" for name in ("q", "k", "out_q", "out_k")} | {"table": "*fp32"}
    integers = dict.fromkeys([*aligned, "q_heads", "k_heads", "N", "prefix", "first"], "i32")
    constants = dict(D=D, INTERLEAVED=interleaved, INVERSE=inverse, TABLE_PER_HEAD=per_head, HEADS=kernels.HEADS)
    constants |= dict(BLOCK_N=kernels.block_n(D), BLOCK_C=triton.next_power_of_2(D // 2))
    options = dict(aligned=aligned, num_warps=kernels.NUM_WARPS)
    return aot.build(kernels.rope3d_kernel, pointers | integers, constants, arch, **options)


def rope3d_freqs(arch, dtype, D, interleaved=True, heads=None):
    import triton
    from evaat_fast.kernels.rope3d import rotate as kernels
    from evaat_fast.kernels.rope3d.freqs import rope3d_freqs_kernel, tokens

    pairs = [f"{x}_{y}" for x in ("grad", "out", "x") for y in "qk"]
    aligned = ["table_half", "table_b", "table_h", *(f"{x}_{d}" for x in pairs for d in "bhn")]
    pointers = dict.fromkeys(pairs, f"*{dtype}") | {"table": "*fp64", "positions": "*fp32", "partial": "*fp64"}
    integers = dict.fromkeys([*aligned, "positions_b", "q_heads", "k_heads", "N", "prefix"], "i32")
    constants = dict(D=D, INTERLEAVED=interleaved, INVERSE=True, HEADS=heads or kernels.HEADS, BLOCK_N=tokens(D))
    constants["BLOCK_C"] = triton.next_power_of_2(D // 2)
    options = dict(aligned=aligned, num_warps=kernels.NUM_WARPS)
    return aot.build(rope3d_freqs_kernel, pointers | integers, constants, arch, **options)


def rope3d_table(arch, out, grid):
    from evaat_fast.kernels.rope3d.table import BLOCK, rope3d_table_kernel

    pointers = {"freqs": "*fp32", "positions": "*fp32", "out": f"*{out}"}
    integers = "freqs_h positions_b positions_n positions_axis out_half out_b out_h M Hp Wp".split()
    constants = dict(C=32, GRID=grid, BLOCK_M=BLOCK // 32, BLOCK_C=32)
    return aot.build(rope3d_table_kernel, pointers | dict.fromkeys(integers, "i32"), constants, arch)


ALIGNED = [f"f.{field}" for field in ("video_n", "text_n", "N", "E")]


def features(dtype):
    from evaat_fast.kernels.pairwise.panel import Features

    return Features(f"*{dtype}", f"*{dtype}", *["i32"] * 4)


def labels(table, indexed, half):
    from evaat_fast.kernels.pairwise.sms import Labels

    indices = ["*i64"] * 2 if indexed else [None] * 2
    strides = ("i32", 1, "i32" if half else 0)  # Triton makes a constant of an integer that is 1
    verb, values = "*i64" if half else None, "*fp32" if table == "u8" else None
    return Labels(f"*{table}", *strides, "i32", "i32", *indices, verb, values)


def sms(arch, dtype, table="fp32", rule="code", write=True, indexed=False, half=False, each=False):
    from evaat_fast.kernels.pairwise import panel
    from evaat_fast.kernels.pairwise import sms as kernels
    from torch import bfloat16, float16, float32

    shape = panel.config({"bf16": bfloat16, "fp16": float16, "fp32": float32}[dtype])
    types = {"f": features(dtype), "labels": labels(table, indexed, half)}
    types["pairs"] = kernels.Pairs(*["*fp32"] * 4, None)
    types["penalty"] = kernels.Penalty(*["fp32"] * len(kernels.Penalty._fields))
    types["out"] = kernels.Out(f"*{dtype}" if write else None, "*i32", "*i32", "*fp32", "*fp32" if each else None, "i32", "i32")
    constants = {"RULE": kernels.RULES[rule]} | {name: shape.pop(name) for name in ("BLOCK", "PRECISION")}
    aligned = [*ALIGNED, "labels.row", "out.first", "out.last"]
    return aot.build(kernels.sms_kernel, types, constants, arch, aligned=aligned, **shape)


def sms_recompute(arch, table="fp32", indexed=False, half=False, E=256, weighted=False):
    from evaat_fast.kernels.pairwise import sms as kernels
    from evaat_fast.kernels.pairwise.sms_recompute import Out, config, sms_recompute_kernel

    shape = config(E, arch // 10)
    types = {"f": features("bf16"), "labels": labels(table, indexed, half), "out": Out("*fp64", "*i32", "*fp32")}
    types["pairs"] = kernels.Pairs(*["*fp32"] * 4, "*fp32" if weighted else None)
    types["penalty"] = kernels.Penalty(*["fp32"] * len(kernels.Penalty._fields))
    constants = {"RULE": 0, "CAPTIONS": True} | {name: shape.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_E")}
    return aot.build(sms_recompute_kernel, types, constants, arch, aligned=[*ALIGNED, "labels.row"], **shape)


def contrast(arch, dtype, sweep, positives="OWN"):
    from evaat_fast.kernels.pairwise import contrast as kernels
    from torch import bfloat16, float32

    kind = getattr(kernels, positives)
    shape = kernels.config({"bf16": bfloat16, "fp32": float32}[dtype], kind, arch // 10)
    dense, bits = ("*i1", "i32", 1) if positives == "DENSE" else [None] * 3, ["*i32" if positives == "SHARED" else None] * 2
    types = {"f": features(dtype)}
    types["logits"] = kernels.Logits(None if positives == "OWN" else "*fp32", "*fp32", *dense, *bits)
    constants = {"VERB_WORDS": 4, "NOUN_WORDS": 19}  # EgoVLP's 118 verbs and 582 nouns
    constants |= {name: shape.pop(name) for name in ("BLOCK", "PRECISION")}
    aligned = [*ALIGNED, "logits.row", "out.first", "out.last"]
    if sweep == "stats":
        types["out"] = kernels.Stats("*fp32", "*fp32", "i32", "i32")
        return aot.build(kernels.contrast_stats_kernel, types, constants, arch, aligned=aligned, **shape)
    types |= {"totals": kernels.Totals(*["*fp32"] * 4, None), "out": kernels.Slopes(f"*{dtype}", "*fp32", "i32", "i32")}
    return aot.build(kernels.contrast_slopes_kernel, types, constants, arch, aligned=aligned, **shape)


def attn(arch, kind, D, interleaved=True, clips=0):
    from evaat_fast.kernels.attn import backward, forward
    from torch import bfloat16

    kernel = getattr(forward if kind == "forward" else backward, f"attn_{'keys' if kind == 'both' else kind}_kernel")
    plan, padded = forward.blocks_of(kind, bfloat16, D, arch // 10), forward.padded(D)
    add = backward.NOTHING if kind != "both" else backward.ATOMIC if arch < 90 else backward.COPY
    constants = dict(D=D, BLOCK_D=padded, ROPE=True, INTERLEAVED=interleaved, PRECISION="tf32x3", KEEP=True)
    constants |= dict(CLIPS=clips, ADD=add.value) | {name: plan.pop(name) for name in ("BLOCK_M", "BLOCK_N")}
    pointers = dict.fromkeys(["q", "k", "v", "out", "turned_q", "do", "dq", "dk", "dv"], "*bf16")
    pointers |= dict.fromkeys(["lse", "delta", "table", "sums"], "*fp32") | {"scale": "fp32", "cu": "*i32"}
    if add is backward.COPY:
        pointers["sums"] = f"tensordesc<fp32[1, {constants['BLOCK_M']}, {padded}]>"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = [name for name in types if name.endswith(("_b", "_h", "_n")) and not name.startswith("lse")]
    return aot.build(kernel, types, constants, arch, aligned=aligned, **plan)


def rows(arch, name):
    """The kernels of the pairwise losses that take a row a program, E = 256 in bfloat16."""
    from evaat_fast.kernels.pairwise import panel

    types, constants = {"f": features("bf16"), "norms": "*fp32"}, {"BLOCK_E": 256}
    if name == "prepare":
        types |= {"unit_video": "*bf16", "unit_text": "*bf16", "inverses": "*fp32"}
        constants["UNITS"] = True
    else:
        types |= {"row_sum": "*i32", "col_sum": "*i32", "weight": None, "factor": "fp32"}
        types |= dict.fromkeys(["grad_video", "grad_text"], "*fp32")
        constants["FIRST"] = 0
    aligned = [x for x in ALIGNED if x != "f.N"]
    return aot.build(getattr(panel, f"{name}_kernel"), types, constants, arch, aligned=aligned)


def _shipped():
    pairs = {"interleaved": True, "half-split": False}
    for dtype, D in [*((d, 64) for d in DTYPES), ("bf16", 80), ("bf16", 128)]:
        for name, interleaved in pairs.items():
            yield f"rope3d {dtype} D{D} {name}", functools.partial(rope3d, dtype=dtype, D=D, interleaved=interleaved)
    inverse = functools.partial(rope3d, dtype="bf16", D=64, inverse=True, per_head=True)
    yield "rope3d bf16 D64 interleaved, inverse, per head", inverse
    for dtype, D, heads in [("bf16", 64, None), ("fp16", 128, None), ("fp32", 64, None), ("bf16", 64, 1)]:
        for name, interleaved in pairs.items():
            of_head = ", per head" if heads else ""
            build = functools.partial(rope3d_freqs, dtype=dtype, D=D, interleaved=interleaved, heads=heads)
            yield f"rope3d_freqs {dtype} D{D} {name}{of_head}", build
    yield "rope3d_table of a grid, fp64", functools.partial(rope3d_table, out="fp64", grid=True)
    yield "rope3d_table of positions, fp32", functools.partial(rope3d_table, out="fp32", grid=False)

    for dtype in DTYPES:
        yield f"sms {dtype}, dense labels", functools.partial(sms, dtype=dtype)
    yield "sms bf16, dense labels, the loss alone", functools.partial(sms, dtype="bf16", write=False)
    yield "sms bf16, codes", functools.partial(sms, dtype="bf16", table="u8")
    yield "sms bf16, indexed codes", functools.partial(sms, dtype="bf16", table="u8", indexed=True)
    yield "sms bf16, verbs and nouns", functools.partial(sms, dtype="bf16", table="u8", indexed=True, half=True)
    yield "sms bf16, dense labels, each pair", functools.partial(sms, dtype="bf16", write=False, each=True)
    yield "sms_recompute bf16 E256, dense labels", sms_recompute
    yield "sms_recompute bf16 E256, dense labels, weighted", functools.partial(sms_recompute, weighted=True)
    sources = dict(table="u8", indexed=True, half=True)
    yield "sms_recompute bf16 E256, verbs and nouns", functools.partial(sms_recompute, **sources)
    yield "sms_recompute bf16 E64, verbs and nouns", functools.partial(sms_recompute, E=64, **sources)
    for dtype in ("bf16", "fp32"):
        for sweep in ("stats", "slopes"):
            yield f"clip {dtype}, {sweep}", functools.partial(contrast, dtype=dtype, sweep=sweep)
    for sweep in ("stats", "slopes"):
        for name, positives in (("a matrix", "DENSE"), ("verbs and nouns", "SHARED")):
            build = functools.partial(contrast, dtype="bf16", sweep=sweep, positives=positives)
            yield f"ego_nce bf16, {sweep}, {name}", build
    for D in (64, 128):
        for kind in ("forward", "keys", "queries", "both"):
            yield f"attn {kind} bf16 D{D} interleaved", functools.partial(attn, kind=kind, D=D)
    for kind in ("forward", "keys", "queries", "both"):
        yield f"attn {kind} bf16 D64 interleaved, packed clips", functools.partial(attn, kind=kind, D=64, clips=64)
    yield "attn forward bf16 D80 half-split", functools.partial(attn, kind="forward", D=80, interleaved=False)
    for name in ("prepare", "finish"):
        yield f"pairwise {name}", functools.partial(rows, name=name)


SHIPPED = dict(_shipped())


@functools.cache
def compiled(name, arch):
    return SHIPPED[name](arch)


@functools.cache
def used(name, arch):
    """aot.resources of a shipped kernel."""
    return aot.resources(compiled(name, arch))


@functools.cache
def listing(name, arch):
    """aot.listing of a shipped kernel, which takes 0.4 s."""
    return aot.listing(compiled(name, arch))


def lines(name, arch):
    """Its machine code as a list of "OPCODE.MODIFIERS operands"."""
    return [code for _, code in listing(name, arch)]
