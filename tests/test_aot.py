"""The shipped GPU kernels compile for every architecture without spills, and move 16 bytes per access. Needs no GPU.

make test compiles every kernel for sm_90, and of each family one kernel for sm_80 or sm_100; make test-all the rest.
"""

import functools
import importlib.util
import random
import re

import aot
import pytest
from aot_kernels import HOPPER, SHIPPED, attn_sm90, lines, listing, rope3d, used
from golden import resources

pytestmark = pytest.mark.aot
pytest.importorskip("triton")
built = pytest.mark.skipif(importlib.util.find_spec("evaat_fast._cuda") is None, reason="built without nvcc")


def spilled_by_this_triton():
    """Bytes a thread: none; Triton 3.6 spills up to 16 registers of the SMS epilogue with indexed labels."""
    return 0 if tuple(map(int, resources.triton_version().split()[-1].split(".")[:2])) >= (3, 9) else 64


@functools.cache
def sampled():
    """The (name, architecture) that make test compiles."""
    families = {}
    for name, build in SHIPPED.items():
        families.setdefault(getattr(build, "func", build).__name__, []).append(name)
    others = set()
    for i, (family, names) in enumerate(families.items()):
        others.add((random.Random(family).choice(names), (80, 100)[i % 2]))
    return others | {(name, 90) for name in SHIPPED}


def compiles(archs, *prefixes):
    """Cases (name, arch) of the kernels whose names begin so. The tests of a kernel share its code."""
    cases = []
    for name in SHIPPED:
        for arch in archs if name.startswith(prefixes or "") else ():
            slow = [] if arch not in aot.ARCHS or (name, arch) in sampled() else [pytest.mark.slow]
            cases.append(pytest.param(name, arch, marks=[pytest.mark.together(name), *slow], id=f"{name}-{arch}"))
    return pytest.mark.parametrize("name,arch", cases)


@compiles(aot.ARCHS)
def test_triton_kernels_fit(name, arch):
    of_it = used(name, arch)
    assert of_it["stack"] <= spilled_by_this_triton(), of_it
    assert of_it["shared"] <= aot.SHARED_LIMIT[arch], of_it
    if name.startswith(("rope3d", "add_norm bf16 768", "add_norm backward bf16 768", "swiglu_norm bf16", "swiglu_norm fp32")):
        assert of_it["registers"] <= 128, of_it  # of a memory-bound kernel: 16 warps and more on an SM


@compiles([90], "sms", "clip ", "ego_nce ", "attn ")
def test_products_are_wgmma_on_hopper(name, arch):
    assert any("GMMA" in line for line in lines(name, arch))


@compiles([90], "attn ")
def test_attention_rarely_waits_for_products_on_hopper(name, arch):
    """In the innermost loop; ptxas waits after each of a dozen where it cannot keep them in flight."""
    inner = aot.inner_loop(listing(name, arch))
    assert any("GMMA" in line for line in inner) and sum("WARPGROUP.DEPBAR" in line for line in inner) <= 3


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("attn sm90")])
def test_attention_in_gluon_fits_hopper(name):
    """Its loop keeps its products in flight, touches no stack and makes weights before it waits for the product of the values.
    Its stack is read once a tile."""
    of_it, inner = used(name, 90), aot.inner_loop(listing(name, 90), 12)
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["stack"] <= 192 and of_it["shared"] <= aot.SHARED_LIMIT[90], of_it
    ops = [line.split()[0] for line in inner]
    waits = [i for i, line in enumerate(inner) if "WARPGROUP.DEPBAR" in line]
    whole = "D128" in name and "half blocks" not in name  # of 128 keys, and half as many or half as wide else
    products, most = (16, 500) if whole else (12, 440)
    assert sum("HGMMA" in op for op in ops) == products and len(waits) == 2 and len(inner) <= most
    assert not any(op.startswith(("LDL", "STL")) for op in ops)
    assert all(waits[0] < i < waits[1] for i, op in enumerate(ops) if op.startswith("MUFU.EX2"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("attn backward sm90") and "D128" not in name])
def test_gradients_in_gluon_fit_hopper(name):
    """Four products in flight: weights are made as two begin and under them, slopes under two others. The stack is for what
    is read once a tile."""
    of_it, inner = used(name, 90), aot.inner_loop(listing(name, 90), 12)
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["stack"] <= 64 and of_it["shared"] <= aot.SHARED_LIMIT[90], of_it
    ops = [line.split()[0] for line in inner]
    assert not any(op.startswith(("LDL", "STL")) for op in ops)
    waits = [i for i, line in enumerate(inner) if "WARPGROUP.DEPBAR" in line]
    products = [i for i, op in enumerate(ops) if op.startswith("HGMMA")]
    weights = [i for i, op in enumerate(ops) if op.startswith("MUFU.EX2")]
    slopes = [i for i, op in enumerate(ops) if op.startswith("STSM")]
    assert len(products) == 16 and len(waits) == 2 and len(inner) <= 420
    assert products[0] < weights[2] and weights[-1] < products[8]
    assert products[-1] < waits[0] < slopes[0] < slopes[-1] < waits[1]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("attn backward sm90") and "D128" in name])
def test_gradients_of_wide_heads_in_gluon_fit_hopper(name):
    """Weights are made under the product of dP, slopes under that of dV, and dQ leaves under the next scores."""
    of_it, inner = used(name, 90), aot.inner_loop(listing(name, 90), 12)
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["stack"] <= 128 and of_it["shared"] <= aot.SHARED_LIMIT[90], of_it
    ops = [line.split()[0] for line in inner]
    assert sum(op.startswith(("LDL", "STL")) for op in ops) <= 4 and len(inner) <= 560
    places = lambda start: [i for i, op in enumerate(ops) if op.startswith(start)]  # noqa: E731
    waits, products = places("WARPGROUP.DEPBAR"), places("HGMMA")
    weights, slopes, sums = (places(x) for x in ("MUFU.EX2", "STSM", "STS.128"))
    assert len(products) == 40 and len(waits) == 4
    assert products[3] < weights[2] and weights[-1] < products[8]  # dP, weights, dV
    assert products[15] < waits[0] < products[16] < products[23] < slopes[0] < products[24]  # dV, slopes, dK, dQ
    assert products[31] < waits[1] < products[32] and products[39] < waits[2] < sums[0] < sums[-1] < waits[3]  # dQ, scores


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("clip sm90")])
def test_info_nce_in_gluon_fits_hopper(name):
    """Of two tiles in turn, exponentials are made as the products of the other begin, and end before they are waited for: 5 to
    10 instructions a pair, where Triton's kernels execute 44 and 74."""
    of_it, steps = used(name, 90), 2 * int(re.search(r"E(\d+)", name)[1]) // 16
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["shared"] <= aot.SHARED_LIMIT[90], of_it
    ops = [line.split()[0] for line in aot.usual(listing(name, 90), steps)]
    # The stack is of addresses that two tiles' products share.
    assert sum(op.startswith(("LDL", "STL")) for op in ops) <= 40 and len(ops) <= 128 * (10 if "slopes" in name else 6.5)
    places = lambda start: [i for i, op in enumerate(ops) if op.startswith(start)]  # noqa: E731
    products, waits, powers = places("HGMMA"), places("WARPGROUP.DEPBAR"), places("MUFU.EX2")
    assert len(products) == steps and len(waits) == 2 and len(powers) == 128
    half = steps // 2
    for tile, wait, begun in ((powers[:64], waits[0], products[0]), (powers[64:], waits[1], products[half])):
        assert begun < tile[8] < tile[-1] < wait
    assert products[half - 1] < powers[16] < waits[0] < products[half] and products[-1] < powers[80] < waits[1]
    if "slopes" in name:
        assert len(places("STSM")) == 16


@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("contrast totals")])
def test_sums_of_info_nce_fit_hopper(name):
    of_it = used(name, 90)
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["stack"] == 0 and of_it["registers"] <= 128, of_it


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith(("gradients", "tiles"))])
def test_what_is_around_gradients_in_gluon_fits_hopper(name):
    of_it = used(name, 90)
    if resources.triton_version() in resources.read():
        assert resources.triton_cell(name, 90) == resources.read()[resources.triton_version()][name]["sm_90"]
    assert of_it["stack"] == 0 and of_it["shared"] <= aot.SHARED_LIMIT[90], of_it
    assert 128 in aot.global_access(lines(name, 90))["load"] or name.startswith("tiles")


@pytest.mark.sample(1)
@compiles([89], "attn ")
def test_attention_fits_ada(name, arch):
    """Which has the instructions of sm_80, and less shared memory."""
    of_it = used(name, arch)
    assert of_it["stack"] == 0 and of_it["shared"] <= aot.SHARED_LIMIT[arch], of_it


@compiles(aot.ARCHS, "rope3d ")
def test_rope3d_moves_16_bytes_per_access(name, arch):
    assert aot.global_access(lines(name, arch)) == {"load": {128}, "store": {128}}


@compiles(aot.ARCHS, "rope3d ")
def test_rope3d_loads_before_it_stores(name, arch):
    """In place a load may not pass a store, so one head would wait for another."""
    stored = False
    for line in lines(name, arch):
        stored = (stored or line.startswith("STG")) and not line.startswith(("EXIT", "BRA"))
        assert not (stored and line.startswith("LDG")), line


def of_this(compiler):
    """The committed rows of the compiler that is here."""
    tables = resources.read()
    if compiler not in tables:
        pytest.skip(f"the table has {' and '.join(tables)}; here is {compiler}")
    return tables[compiler]


def test_the_table_has_every_triton_kernel():
    assert set(of_this(resources.triton_version())) == {*SHIPPED, *HOPPER}, "cd tests && python -m golden.resources"


@compiles(aot.ARCHS)
def test_triton_kernels_are_those_of_the_table(name, arch):
    assert resources.triton_cell(name, arch) == of_this(resources.triton_version())[name][f"sm_{arch}"]


@built
def test_cuda_kernels_are_those_of_the_table():
    rows = of_this(resources.nvcc_version())
    ours = resources.cuda_rows()
    assert set(rows) == set(ours), "cd tests && python -m golden.resources"
    for name, cells in ours.items():
        assert cells.items() <= rows[name].items(), name


@built
def test_losses_in_cuda_execute_what_the_table_says():
    """Two blocks of 8 warps an SM, and near 50 instructions a pair, of which labels by verb and noun take the most."""
    from evaat_fast import _cuda

    ours = resources.executed_rows()
    of_panels = [x for (_, name), x in aot.module_resources(_cuda.__file__).items() if re.search(r"sms_kernelI.*ELb0E", name)]
    assert of_panels and all(x["registers"] <= 128 and x["stack"] == 0 for x in of_panels)
    assert ours and all(float(x.split(" / ")[0]) <= 55 for cells in ours.values() for x in cells.values())
    rows = of_this(f"{resources.EXECUTED} {resources.nvcc_version()}")
    for name, cells in ours.items():
        assert cells.items() <= rows[name].items(), name


@built
def test_cuda_kernels_fit_and_move_16_bytes_per_access():
    from evaat_fast import _cuda

    kernels = aot.module_resources(_cuda.__file__)
    rope = {name: used for name, used in kernels.items() if "rope3d" in name[1]}
    assert len(rope) >= 12 and all(used["stack"] == 0 for used in kernels.values())
    # 256 threads a block: two blocks an SM at least.
    assert all(used["registers"] <= 128 for used in rope.values()), rope
    packed = [k for k in kernels if "rope3d_kernelI13__nv_bfloat16Lb1ELi4E" in k[1]]
    assert packed, "the name of the kernel for interleaved bfloat16 has changed"
    for key in packed:
        code = [line for _, line in aot.module_listings(_cuda.__file__)[key]]
        assert aot.global_access(code) == {"load": {128}, "store": {128}}
        first_store = next(i for i, line in enumerate(code) if line.startswith("STG"))
        assert not any(line.startswith("LDG") for line in code[first_store:]), "a load waits for a store"


def test_a_launch_that_may_begin_early_waits_before_it_reads():
    """The rotation of keys lets the next kernel begin; attention waits for it in the warps that start all others, before any
    copy or load, and neither does so where it is not asked to."""
    for early in (False, True):
        turning = rope3d(90, "bf16", 64, early=early).asm["ptx"]
        assert turning.count("griddepcontrol.launch_dependents") == early
        for D in (64, 128):
            reading = attn_sm90(90, D=D, PDL=early)
            ptx = reading.asm["ptx"]
            assert ptx.count("griddepcontrol.wait") == early
            for access in ("cp.async.bulk.tensor", "ld.global") if early else ():
                assert 0 < ptx.index("griddepcontrol.wait") < ptx.index(access), access
