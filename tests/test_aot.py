"""The shipped GPU kernels compile for every architecture without spills, and move 16 bytes per access. Needs no GPU."""

import importlib.util

import aot
import pytest
from aot_kernels import SHIPPED, compiled
from golden import resources

pytestmark = pytest.mark.aot
pytest.importorskip("triton")
archs = pytest.mark.parametrize("arch", aot.ARCHS)
built = pytest.mark.skipif(importlib.util.find_spec("evaat_fast._cuda") is None, reason="built without nvcc")


def spilled_by_this_triton():
    """Bytes a thread: none; Triton 3.6 spills up to 16 registers of the SMS epilogue with indexed labels."""
    return 0 if tuple(map(int, resources.triton_version().split()[-1].split(".")[:2])) >= (3, 9) else 64


@archs
@pytest.mark.parametrize("name", SHIPPED)
def test_triton_kernels_fit(name, arch):
    used = aot.resources(compiled(name, arch))
    assert used["stack"] <= spilled_by_this_triton(), used
    assert used["shared"] <= aot.SHARED_LIMIT[arch], used
    if name.startswith("rope3d"):
        assert used["registers"] <= 128, used  # of a memory-bound kernel: 16 warps and more on an SM


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith(("sms", "clip ", "ego_nce ", "attn "))])
def test_products_are_wgmma_on_hopper(name):
    assert any("GMMA" in line for line in aot.instructions(compiled(name, 90)))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("attn ")])
def test_attention_rarely_waits_for_products_on_hopper(name):
    """In the innermost loop; ptxas waits after each of a dozen where it cannot keep them in flight."""
    inner = aot.inner_loop(aot.listing(compiled(name, 90)))
    assert any("GMMA" in line for line in inner) and sum("WARPGROUP.DEPBAR" in line for line in inner) <= 3


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("attn ")])
def test_attention_fits_ada(name):
    """Which has the instructions of sm_80, and less shared memory."""
    used = aot.resources(compiled(name, 89))
    assert used["stack"] == 0 and used["shared"] <= aot.SHARED_LIMIT[89], used


def test_one_pass_adds_with_the_copy_engine():
    for name in SHIPPED:
        if name.startswith("attn both"):
            for arch in (90, 100):
                code = aot.instructions(compiled(name, arch))
                assert any(line.startswith("UTMAREDG") for line in code) and not any(line.startswith("RED.") for line in code)


@archs
@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("rope3d ")])
def test_rope3d_moves_16_bytes_per_access(name, arch):
    assert aot.global_access(aot.instructions(compiled(name, arch))) == {"load": {128}, "store": {128}}


def of_this(compiler):
    """The committed rows of the compiler that is here."""
    tables = resources.read()
    if compiler not in tables:
        pytest.skip(f"the table has {' and '.join(tables)}; here is {compiler}")
    return tables[compiler]


def test_triton_kernels_are_those_of_the_table():
    rows = of_this(resources.triton_version())
    assert set(rows) == set(SHIPPED), "cd tests && python -m golden.resources"
    for name, cells in rows.items():
        assert {arch: resources.triton_cell(name, int(arch[3:])) for arch in cells} == cells, name


@built
def test_cuda_kernels_are_those_of_the_table():
    rows = of_this(resources.nvcc_version())
    ours = resources.cuda_rows()
    assert set(rows) == set(ours), "cd tests && python -m golden.resources"
    for name, cells in ours.items():
        assert cells.items() <= rows[name].items(), name


@built
def test_cuda_kernels_fit_and_move_16_bytes_per_access():
    from evaat_fast import _cuda

    kernels = aot.module_resources(_cuda.__file__)
    rope = {name: used for name, used in kernels.items() if "rope3d" in name[1]}
    assert len(rope) >= 2 * 12 and all(used["stack"] == 0 for used in kernels.values())
    # 256 threads a block: two blocks an SM at least.
    assert all(used["registers"] <= 128 for used in rope.values()), rope
    packed = [k for k in kernels if "rope3d_kernelI13__nv_bfloat16Lb1ELi4E" in k[1]]
    assert packed, "the name of the kernel for interleaved bfloat16 has changed"
    for key in packed:
        code = [line for _, line in aot.module_listings(_cuda.__file__)[key]]
        assert aot.global_access(code) == {"load": {128}, "store": {128}}
        first_store = next(i for i, line in enumerate(code) if line.startswith("STG"))
        assert not any(line.startswith("LDG") for line in code[first_store:]), "a load waits for a store"
