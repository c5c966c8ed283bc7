"""The shipped configurations of the GPU kernels: name -> what compiles it for an architecture."""

import functools

import aot

DTYPES = ("bf16", "fp16", "fp32")


def rows(dtype):
    from evaat_fast.kernels.launch import Rows

    return Rows(f"*{dtype}", "i32", "i32", "i32")


def strides(*names):
    """Of tensors whose rows are multiples of 16 bytes apart."""
    return [f"{name}.{axis}" for name in names for axis in "bhn"]


def table(dtype):
    from evaat_fast.kernels.launch import Table

    return Table(f"*{dtype}", "i32", "i32", "i32")


TABLE = ["table.half", "table.b", "table.h"]


def rope3d(arch, dtype, D, interleaved=True, inverse=False, per_head=False, tensors="q k out_q out_k", early=False):
    """tensors: those that are not None. Without out_q it turns in place, with v it copies values too."""
    from evaat_fast.kernels.rope3d import rotate as kernels

    types = dict.fromkeys("q k v out_q out_k out_v".split()) | dict.fromkeys(tensors.split(), rows(dtype))
    types |= {"table": table("fp32")} | dict.fromkeys(("q_heads", "k_heads", "N", "prefix", "first", "clip"), "i32")
    elements = kernels.BLOCK_ELEMENTS // (2 if dtype == "fp32" else 1)
    types["S"] = kernels.shape_of(D, interleaved, inverse, per_head, elements=elements, early=early)
    aligned = [*TABLE, *strides(*tensors.split()), "clip"]
    return aot.build(kernels.rope3d_kernel, types, {}, arch, aligned=aligned, **kernels.OPTIONS)


def rope3d_freqs(arch, dtype, D, interleaved=True, per_head=False):
    from evaat_fast.kernels.rope3d import freqs as kernels

    pairs = ("grads", "outs", "xs")
    types = dict.fromkeys(pairs, (rows(dtype), rows(dtype))) | {"table": table("fp64")}
    types |= {"positions": "*fp32", "positions_b": "i32", "partial": "*fp64"}
    types |= dict.fromkeys(("q_heads", "k_heads", "N", "prefix"), "i32")
    types["S"] = kernels.shape_with_freqs(D, interleaved, True, per_head)
    aligned = [*TABLE, *strides(*(f"{x}.{i}" for x in pairs for i in (0, 1)))]
    return aot.build(kernels.rope3d_freqs_kernel, types, {}, arch, aligned=aligned, **kernels.OPTIONS)


def rope3d_table(arch, out, grid):
    from evaat_fast.kernels.rope3d.table import BLOCK, Positions, rope3d_table_kernel

    positions = None if grid else Positions("*fp32", "i32", "i32", "i32")
    types = {"freqs": "*fp32", "positions": positions, "out": table(out)} | dict.fromkeys(("freqs_h", "M", "Hp", "Wp"), "i32")
    return aot.build(rope3d_table_kernel, types, dict(C=32, BLOCK_M=BLOCK // 32, BLOCK_C=32), arch)


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
        types["out"] = kernels.Stats("*fp32", "*fp32", "*fp32", "i32", "i32")
        return aot.build(kernels.contrast_stats_kernel, types, constants, arch, aligned=aligned, **shape)
    types |= {"totals": kernels.Totals(*["*fp32"] * 4, None), "out": kernels.Slopes(f"*{dtype}", "*fp32", "i32", "i32")}
    return aot.build(kernels.contrast_slopes_kernel, types, constants, arch, aligned=aligned, **shape)


def attn(arch, kind, D, interleaved=True, clips=0):
    import triton.language as tl
    from evaat_fast.kernels.attn import backward, forward
    from torch import bfloat16

    kernel = getattr(forward if kind == "forward" else backward, f"attn_{kind}_kernel")
    block_m, block_n, launch = forward.blocks_of(kind, bfloat16, D, arch // 10)
    padded = forward.padded(D)
    tensors = ("q", "k", "v", "out", "turned_q", "do", "dq", "dk", "dv")
    types = dict.fromkeys(tensors, rows("bf16")) | {"table": table("fp32"), "lse": rows("fp32")._replace(n=1), "delta": "*fp32"}
    types["call"] = forward.Call(*["i32"] * 5, "*i32" if clips else None, "i32", "fp32")
    types["S"] = forward.Shape(*map(tl.constexpr, (D, padded, interleaved, clips, block_m, block_n)))
    types = {name: types[name] for name in kernel.arg_names if name in types}
    return aot.build(kernel, types, {}, arch, aligned=[*TABLE[1:], *strides(*tensors)], **launch)


def attn_sm90(arch, dtype="bf16", D=64, tail=32, keep=True, turned=True, clips=False, **shape):
    """The forward pass on Hopper, of tails of 16, 32, 64 or 128 keys, or of packed clips. shape: where it is another than the
    shipped one."""
    from evaat_fast.kernels.attn import sm90
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    shape = sm90.shape_of(785, D) | shape
    of = lambda rows: f"tensordesc<{dtype}[1, 1, {rows}, {D}],{layout!r}>"  # noqa: E731
    types = dict.fromkeys(("q", "out", "turned"), of(64)) | dict.fromkeys(("k", "v"), of(shape["BN"]))
    types |= dict.fromkeys(("k_tail", "v_tail"), of(tail)) | {"lse": "*fp32", "table": table("fp32") if turned else None}
    types["call"] = sm90.Call("i32", 1, *["i32"] * 5, "fp32", 1)
    if clips:
        tail, types["k_tail"], types["v_tail"] = 0, None, None
        types["call"] = sm90.Call("i32", 1, "i32", *[0] * 4, "fp32", 0, "*i32")
    constants = dict(TAIL=tail, D=D, KEEP=keep) | shape
    return aot.build(sm90.attn_forward_sm90_kernel, types, constants, arch, aligned=TABLE, num_warps=4)


def attn_backward_sm90(arch, dtype="bf16", D=64, turned=True, whole=True, columns=False, ordered=False, clips=False):
    from evaat_fast.kernels.attn import sm90_backward as kernels
    from evaat_fast.kernels.attn import sm90_wide
    from triton.experimental.gluon import language as gl

    layout, plain = gl.NVMMASharedLayout(128, 16, rank=4), gl.NVMMASharedLayout(0, 32, rank=2)
    types = dict.fromkeys(("q", "k", "v", "do"), f"tensordesc<{dtype}[1, 1, 64, 64],{layout!r}>")
    types |= {"stats": f"tensordesc<fp32[1, 64],{plain!r}>", "sums": f"tensordesc<fp32[64, 64],{plain!r}>"}
    types |= dict.fromkeys(("dk", "dv"), rows(dtype)) | {"table": table("fp32") if turned else None}
    types |= {"call": kernels.Call("i32", 1, *["i32"] * 5, "fp32", "fp32", 1), "columns": "*fp32" if columns else None}
    types["turns"] = "*i32" if ordered else None
    if clips:
        whole, types["call"] = False, kernels.Call("i32", 1, "i32", *[0] * 4, "fp32", "fp32", 0, "*i32")
    kernel, constants = kernels.attn_backward_sm90_kernel, kernels.SHAPE | {"WHOLE": whole}
    if D == 128:
        kernel, constants = sm90_wide.attn_backward_wide_kernel, sm90_wide.SHAPE | {"WHOLE": whole}
    return aot.build(kernel, types, constants, arch, aligned=[*TABLE, *strides("dk", "dv")], num_warps=4)


def attn_ends_sm90(arch, name, tail, D=64, columns=False):
    """Before and behind the backward pass on Hopper."""
    import triton.language as tl
    from evaat_fast.kernels.attn import forward, sm90_backward, sm90_ends, sm90_wide
    from evaat_fast.kernels.attn.sm90_backward import Call

    kernel, tensors = getattr(sm90_ends, f"attn_{name}_sm90_kernel"), ("q", "k", "v", "out", "do", "dq", "dk", "dv")
    types = dict.fromkeys(tensors, rows("bf16")) | dict.fromkeys(("table", "k_table"), table("fp32"))
    types |= {"lse": rows("fp32")._replace(n=1), "dlse": None, "parts": "i32"} | dict.fromkeys(("stats", "sums"), "*fp32")
    types |= {"turns": None, "shares": "*fp32" if tail else None, "columns": "*fp32" if columns else None}
    types["call"] = Call("i32", 1, *["i32"] * 5, "fp32", "fp32", 1)
    types["S"] = forward.Shape(*map(tl.constexpr, (D, D, True, 0, 64, 128)))
    ends = (sm90_wide if D == 128 else sm90_backward).ENDS
    types, launch = {x: types[x] for x in kernel.arg_names if x in types}, ends["launch" if name == "prepare" else "behind"]
    return aot.build(kernel, types, {"TAIL": tail}, arch, aligned=[*TABLE, *strides(*tensors)], **launch)


def attn_clips_sm90(arch, name):
    """Around the backward pass of packed clips on Hopper."""
    import triton.language as tl
    from evaat_fast.kernels.attn import forward, sm90_backward, sm90_clips

    kernel, launch = (
        getattr(sm90_clips, f"attn_{name}_clips_kernel"),
        sm90_backward.ENDS["launch" if name == "prepare" else "behind"],
    )
    types = dict.fromkeys(("out", "do", "dq"), rows("bf16")) | {"lse": rows("fp32")._replace(b=1, n=1), "dlse": None}
    types |= dict.fromkeys(("stats", "sums"), "*fp32") | {"turns": None, "table": table("fp32")}
    types["call"] = sm90_backward.Call("i32", 1, "i32", *[0] * 4, "fp32", "fp32", 0, "*i32")
    types["S"] = forward.Shape(*map(tl.constexpr, (64, 64, True, 0, 64, 128)))
    types = {x: types[x] for x in kernel.arg_names}
    return aot.build(kernel, types, {}, arch, aligned=[*TABLE, *strides("out", "do", "dq")], **launch)


def attn_tiles_sm90(arch):
    from evaat_fast.kernels.attn import sm90_clips

    types, options = {"cu": "*i32", "tiles": "*i32", "clips": "i32", "total": "i32"}, dict(sm90_clips.CLIPS)
    warps = options.pop("num_warps")
    return aot.build(sm90_clips.attn_tiles_kernel, types, {"SIZE": 192} | options, arch, num_warps=warps)


def of_rows(arch, name):
    """The kernels of the pairwise losses that take a row a program, E = 256 in bfloat16."""
    from evaat_fast.kernels.pairwise import panel

    types, constants = {"f": features("bf16"), "norms": "*fp32"}, {"BLOCK_E": 256}
    if name == "prepare":
        types |= {"unit_video": "*bf16", "unit_text": "*bf16", "inverses": "*fp32", "sums": "*i32"}
    else:
        types |= {"sums": "*i32", "weight": None, "grads": ("*fp32", "*fp32"), "scale": None, "factor": "fp32", "rows": "i32"}
        types["ends"] = panel.Ends("*fp32", "*fp32", "i32", None, None, 0, "i64")
        constants["FIRST"] = 0
    aligned = [x for x in ALIGNED if x != "f.N"]
    return aot.build(getattr(panel, f"{name}_kernel"), types, constants, arch, aligned=aligned)


def contrast_totals(arch, every):
    from evaat_fast.kernels.pairwise import contrast as kernels

    types = {"stats": kernels.Stats("*fp32", "*fp32", "*fp32", "i32", "i32"), "sums": kernels.Sums("*fp64", "*fp64")}
    types |= {"totals": kernels.Totals(*["*fp32"] * 4, None), "halves": ("i64", "i64")} | dict.fromkeys(
        ("N", "down", "across"), "i32"
    )
    return aot.build(kernels.contrast_totals_kernel, types, {"EVERY": every, "BLOCK": 64}, arch, num_warps=2)


def contrast_sm90(arch, sweep, dtype="bf16", E=256, weight=False):
    from evaat_fast.kernels.pairwise import contrast_sm90 as kernels
    from evaat_fast.kernels.pairwise import contrast_totals

    of = lambda rows, columns: f"tensordesc<{dtype}[{rows}, {columns}],{kernels.LAYOUT!r}>"  # noqa: E731
    types = {"video": of(64, E), "text": of(128, E), "scale": "*fp32", "call": kernels.Call(*["i32"] * 6)}
    kernel, constants = getattr(kernels, f"contrast_{sweep}_sm90_kernel"), {"E": E, **kernels.SHAPES[sweep]}
    if sweep == "stats":
        types["out"] = contrast_totals.Sums("*fp32", "*fp32", "*fp32", "*i32")
    else:
        types |= {"panel": of(64, 128), "of_scale": "*fp32", "again": "*i32"}
        types["totals"] = contrast_totals.Totals("*fp32", "*fp32", "*fp32", "*fp32" if weight else None)
    aligned = ["call.N", "call.first", "call.last", "call.span"]
    return aot.build(kernel, types, constants, arch, aligned=aligned, num_warps=4)


def contrast_totals_sm90(arch, name):
    from evaat_fast.kernels.pairwise import contrast_totals as kernels

    types = {"sums": kernels.Sums("*fp32", "*fp32", "*fp32", "*i32"), "totals": kernels.Totals(*["*fp32"] * 3, None)}
    types |= {"costs": kernels.Costs("*fp64", "*fp64"), "scale": "*fp32"}
    if name == "totals":
        types |= dict.fromkeys(("N", "first", "last", "strips", "parts"), "i32")
        return aot.build(kernels.contrast_totals_sm90_kernel, types, {"BLOCK": 64}, arch, num_warps=2)
    types |= {"f": features("bf16"), "rows": "i32"}
    constants = {"BLOCK": 64, "BLOCK_K": 64}
    return aot.build(kernels.contrast_again_kernel, types, constants, arch, aligned=ALIGNED, num_warps=4, num_stages=2)


def pairwise_scale(arch):
    from evaat_fast.kernels.pairwise.panel import scale_kernel

    types = {"factor": "*fp32", "xs": ("*fp32", "*fp32"), "outs": ("*bf16", "*bf16"), "of_scale": "*fp32", "to_scale": "*fp32"}
    return aot.build(scale_kernel, types | {"count": "i32"}, {"BLOCK": 4096}, arch, aligned=["count"], num_warps=8)


def sms_diagonal(arch, labelled):
    """labelled: what `labels` takes, or None."""
    from evaat_fast.kernels.pairwise import panel
    from evaat_fast.kernels.pairwise import sms as kernels
    from torch import bfloat16

    shape = panel.config(bfloat16)
    types = {"f": features("bf16"), "labels": labelled and labels(*labelled), "pairs": kernels.Pairs(*["*fp32"] * 4, None)}
    constants = {"LABELLED": labelled is not None} | {name: shape.pop(name) for name in ("BLOCK", "PRECISION")}
    return aot.build(kernels.diagonal_kernel, types, constants, arch, aligned=[*ALIGNED, "labels.row"], **shape)


def norm(arch, kind, C, dtype="bf16", residual=True, of_x=False):
    """of_x: sums of x's columns too."""
    from evaat_fast.kernels.norm import add, rows, swiglu

    row, wide = f"*{dtype}", "*fp32"
    if kind == "sums":
        constants = rows.SUMS | {"C": C, "KINDS": 3 if of_x else 2}
        warps = constants.pop("num_warps")
        types = {"sums": wide, "dweight": wide, "dbias": wide, "dx_bias": wide if of_x else None, "P": "i32"}
        return aot.build(rows.sums_kernel, types, constants, arch, num_warps=warps)
    stream = wide if residual else None
    kernel, types = {
        "add_norm": (
            add.add_norm_kernel,
            {"x": row, "residual": stream, "bias": wide, "normed": row, "total": stream, "eps": "fp32"},
        ),
        "add_norm backward": (
            add.add_norm_backward_kernel,
            {"dY": row, "dR": stream, "total": stream or row, "dx": row, "dr": stream, "sums": wide},
        ),
        "swiglu_norm": (swiglu.swiglu_norm_kernel, {"x": row, "bias": wide, "out": row, "eps": "fp32"}),
        "swiglu_norm backward": (swiglu.swiglu_norm_backward_kernel, {"dY": row, "x": row, "dx": row, "sums": wide}),
    }[kind]
    module = add if kind.startswith("add") else swiglu
    options = module.forward_config(C)
    if kind.endswith("backward"):
        read = ("dY", "total", "dR") if module is add else ("dY", "x", "x")
        options = module.backward_config(C, *(4 if types[x] == wide else 2 for x in read if types[x]), of_x=of_x)
    warps = options.pop("num_warps")
    constants = options | ({} if module is add else {"EXACT": dtype == "fp32"})
    return aot.build(kernel, types | {"weight": wide, "statistics": wide, "M": "i32"}, constants, arch, num_warps=warps)


def _shipped():
    pairs = {"interleaved": True, "half-split": False}
    for dtype, D in [*((d, 64) for d in DTYPES), ("bf16", 80), ("bf16", 128)]:
        for name, interleaved in pairs.items():
            yield f"rope3d {dtype} D{D} {name}", functools.partial(rope3d, dtype=dtype, D=D, interleaved=interleaved)
    inverse = functools.partial(rope3d, dtype="bf16", D=64, inverse=True, per_head=True)
    yield "rope3d bf16 D64 interleaved, inverse, per head", inverse
    for name, tensors in (("in place", "q k"), ("inverse, packed", "q k v out_q out_k out_v")):
        build = functools.partial(rope3d, dtype="bf16", D=64, inverse="v" in tensors, tensors=tensors)
        yield f"rope3d bf16 D64 interleaved, {name}", build
    for dtype, D, per_head in [("bf16", 64, False), ("fp16", 128, False), ("fp32", 64, False), ("bf16", 64, True)]:
        for name, interleaved in pairs.items():
            of_head = ", per head" if per_head else ""
            build = functools.partial(rope3d_freqs, dtype=dtype, D=D, interleaved=interleaved, per_head=per_head)
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
    for dtype in ("bf16", "fp32"):
        for sweep in ("stats", "slopes"):
            yield f"clip {dtype}, {sweep}", functools.partial(contrast, dtype=dtype, sweep=sweep)
    for sweep in ("stats", "slopes"):
        for name, positives in (("a matrix", "DENSE"), ("verbs and nouns", "SHARED")):
            build = functools.partial(contrast, dtype="bf16", sweep=sweep, positives=positives)
            yield f"ego_nce bf16, {sweep}, {name}", build
    for D in (64, 128):
        for kind in ("forward", "keys", "queries"):
            yield f"attn {kind} bf16 D{D} interleaved", functools.partial(attn, kind=kind, D=D)
    for kind in ("forward", "keys", "queries"):
        yield f"attn {kind} bf16 D64 interleaved, packed clips", functools.partial(attn, kind=kind, D=64, clips=64)
    yield "attn forward bf16 D80 half-split", functools.partial(attn, kind="forward", D=80, interleaved=False)
    for kind in ("add_norm", "add_norm backward"):
        for C, dtype, residual in ((768, "bf16", True), (768, "bf16", False), (4096, "bf16", True), (768, "fp32", True)):
            of = "a stream" if residual else "no stream"
            yield f"{kind} {dtype} {C}, {of}", functools.partial(norm, kind=kind, C=C, dtype=dtype, residual=residual)
    for kind in ("swiglu_norm", "swiglu_norm backward"):
        for C, dtype in ((2048, "bf16"), (2730, "bf16"), (2048, "fp32")):
            yield f"{kind} {dtype} {C}", functools.partial(norm, kind=kind, C=C, dtype=dtype)
    yield "norm sums 768", functools.partial(norm, kind="sums", C=768)
    yield "norm sums 768, of x", functools.partial(norm, kind="sums", C=768, of_x=True)
    for C, dtype in ((768, "bf16"), (1024, "bf16"), (768, "fp32")):
        build = functools.partial(norm, kind="add_norm backward", C=C, dtype=dtype, of_x=True)
        yield f"add_norm backward {dtype} {C}, a stream, of x", build
    for C, dtype in ((2048, "bf16"), (2730, "bf16"), (2048, "fp32")):
        build = functools.partial(norm, kind="swiglu_norm backward", C=C, dtype=dtype, of_x=True)
        yield f"swiglu_norm backward {dtype} {C}, of x", build
    for name in ("prepare", "finish"):
        yield f"pairwise {name}", functools.partial(of_rows, name=name)
    yield "pairwise scale", pairwise_scale
    for name, of in (("verbs and nouns", ("u8", True, True)), ("dense labels", ("fp32", False, False)), ("no labels", None)):
        yield f"sms diagonal, {name}", functools.partial(sms_diagonal, labelled=of)
    yield "contrast totals", functools.partial(contrast_totals, every=False)
    yield "contrast totals, of more positives", functools.partial(contrast_totals, every=True)


SHIPPED = dict(_shipped())
# In Gluon, for one architecture.
HOPPER = {
    "attn sm90 bf16, tail 32, training": attn_sm90,
    "attn sm90 bf16, tail 32": functools.partial(attn_sm90, keep=False),
    "attn sm90 bf16, tail 128, training": functools.partial(attn_sm90, tail=128),
    "attn sm90 fp16, tail 64, no rotation": functools.partial(attn_sm90, dtype="fp16", tail=64, keep=False, turned=False),
    "attn sm90 bf16 D128, tail 32, training": functools.partial(attn_sm90, D=128),
    "attn sm90 bf16 D128, tail 32, half blocks": functools.partial(attn_sm90, D=128, GROUPS=3, BN=64, STAGES=3, REGISTERS=160),
    "attn sm90 fp16 D128, tail 64, no rotation": functools.partial(
        attn_sm90, dtype="fp16", D=128, tail=64, keep=False, turned=False
    ),
    "attn sm90 bf16, packed clips, training": functools.partial(attn_sm90, clips=True),
    "attn sm90 bf16, packed clips": functools.partial(attn_sm90, clips=True, keep=False),
    "attn sm90 fp16, packed clips, no rotation": functools.partial(
        attn_sm90, dtype="fp16", clips=True, keep=False, turned=False
    ),
    "attn backward sm90 bf16": attn_backward_sm90,
    "attn backward sm90 fp16, no rotation": functools.partial(attn_backward_sm90, dtype="fp16", turned=False),
    "attn backward sm90 bf16, ends": functools.partial(attn_backward_sm90, whole=False),
    "attn backward sm90 bf16, ordered": functools.partial(attn_backward_sm90, ordered=True),
    "attn backward sm90 bf16, column sums": functools.partial(attn_backward_sm90, columns=True),
    "attn backward sm90 bf16, packed clips": functools.partial(attn_backward_sm90, clips=True),
    "attn backward sm90 bf16, packed clips, ordered": functools.partial(attn_backward_sm90, clips=True, ordered=True),
    "attn backward sm90 fp16, packed clips, no rotation": functools.partial(
        attn_backward_sm90, dtype="fp16", turned=False, clips=True
    ),
    "attn backward sm90 bf16 D128": functools.partial(attn_backward_sm90, D=128),
    "attn backward sm90 fp16 D128, no rotation": functools.partial(attn_backward_sm90, dtype="fp16", D=128, turned=False),
    "attn backward sm90 bf16 D128, ends": functools.partial(attn_backward_sm90, D=128, whole=False),
    "gradients prepare sm90 D128, tail 0": functools.partial(attn_ends_sm90, name="prepare", D=128, tail=0),
    "gradients prepare sm90 D128, tail 32": functools.partial(attn_ends_sm90, name="prepare", D=128, tail=32),
    "gradients finish sm90 D128, tail 0": functools.partial(attn_ends_sm90, name="finish", D=128, tail=0),
    "gradients finish sm90 D128, tail 32": functools.partial(attn_ends_sm90, name="finish", D=128, tail=32),
    "gradients prepare sm90, tail 0": functools.partial(attn_ends_sm90, name="prepare", tail=0),
    "gradients prepare sm90, tail 32": functools.partial(attn_ends_sm90, name="prepare", tail=32),
    "gradients prepare sm90, tail 64": functools.partial(attn_ends_sm90, name="prepare", tail=64),
    "gradients finish sm90, tail 0": functools.partial(attn_ends_sm90, name="finish", tail=0),
    "gradients finish sm90, tail 32": functools.partial(attn_ends_sm90, name="finish", tail=32),
    "gradients prepare sm90, packed clips": functools.partial(attn_clips_sm90, name="prepare"),
    "gradients finish sm90, packed clips": functools.partial(attn_clips_sm90, name="finish"),
    "tiles of packed clips sm90": attn_tiles_sm90,
    "gradients finish sm90, tail 64, column sums": functools.partial(attn_ends_sm90, name="finish", tail=64, columns=True),
    "clip sm90 bf16 E256, stats": functools.partial(contrast_sm90, sweep="stats"),
    "clip sm90 fp16 E64, stats": functools.partial(contrast_sm90, sweep="stats", dtype="fp16", E=64),
    "clip sm90 bf16 E256, slopes": functools.partial(contrast_sm90, sweep="slopes"),
    "clip sm90 fp16 E128, slopes, weighted": functools.partial(contrast_sm90, sweep="slopes", dtype="fp16", E=128, weight=True),
    "contrast totals sm90": functools.partial(contrast_totals_sm90, name="totals"),
    "contrast totals sm90, once more": functools.partial(contrast_totals_sm90, name="again"),
}


@functools.cache
def compiled(name, arch):
    return (SHIPPED | HOPPER)[name](arch)


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
