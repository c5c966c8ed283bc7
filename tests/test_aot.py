"""The shipped GPU kernels compile for every architecture without spills, and move 16 bytes per access. Needs no GPU."""

import importlib.util

import aot
import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

ROPE_STRIDES = [f"{x}_{d}" for x in ("q", "k", "out_q", "out_k") for d in "bhn"]
ROPE_INTEGERS = ["table_half", "table_b", "table_h", *ROPE_STRIDES, "q_heads", "k_heads", "N", "prefix", "first"]


def rope3d(arch, dtype, D, interleaved=True, inverse=False, per_head=False):
    import triton
    from evaat_fast.kernels import rope3d as kernels

    pointers = {name: f"*{dtype}" for name in ("q", "k", "out_q", "out_k")} | {"table": "*fp32"}
    constants = dict(D=D, INTERLEAVED=interleaved, INVERSE=inverse, TABLE_PER_HEAD=per_head, HEADS=kernels.HEADS)
    constants |= dict(BLOCK_N=kernels.block_n(D), BLOCK_C=triton.next_power_of_2(D // 2))
    return aot.build(
        kernels.rope3d_kernel,
        pointers | dict.fromkeys(ROPE_INTEGERS, "i32"),
        constants,
        arch,
        aligned=["table_half", "table_b", "table_h", *ROPE_STRIDES],
        num_warps=kernels.NUM_WARPS,
    )


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("dtype,D", [("bf16", 64), ("fp16", 64), ("fp32", 64), ("bf16", 128), ("bf16", 80)])
def test_rope3d_fits(arch, dtype, D, interleaved):
    used = aot.resources(rope3d(arch, dtype, D, interleaved))
    assert used["stack"] == 0, used
    assert used["shared"] <= aot.SHARED_LIMIT[arch], used
    assert used["registers"] <= 128, used  # 16 warps and more on an SM


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
def test_rope3d_moves_16_bytes_per_access(arch, interleaved):
    code = aot.instructions(rope3d(arch, "bf16", 64, interleaved))
    assert aot.global_access(code) == {"load": {128}, "store": {128}}


def rope3d_freqs(arch, dtype, D, interleaved=True, heads=None):
    import triton
    from evaat_fast.kernels import rope3d as kernels
    from evaat_fast.kernels.rope3d_freqs import rope3d_freqs_kernel, tokens

    pairs = [f"{x}_{y}" for x in ("grad", "out", "x") for y in "qk"]
    strides = [f"{x}_{d}" for x in pairs for d in "bhn"]
    pointers = dict.fromkeys(pairs, f"*{dtype}") | {"table": "*fp64", "positions": "*fp32", "partial": "*fp64"}
    aligned = ["table_half", "table_b", "table_h", *strides]
    integers = dict.fromkeys([*aligned, "positions_b", "q_heads", "k_heads", "N", "prefix"], "i32")
    constants = dict(D=D, INTERLEAVED=interleaved, INVERSE=True, HEADS=heads or kernels.HEADS, BLOCK_N=tokens(D))
    constants["BLOCK_C"] = triton.next_power_of_2(D // 2)
    return aot.build(rope3d_freqs_kernel, pointers | integers, constants, arch, aligned=aligned, num_warps=kernels.NUM_WARPS)


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("dtype,D,heads", [("bf16", 64, None), ("fp16", 128, None), ("fp32", 64, None), ("bf16", 64, 1)])
def test_rope3d_freqs_fits(arch, dtype, D, interleaved, heads):
    compiled = rope3d_freqs(arch, dtype, D, interleaved, heads)
    used = aot.resources(compiled)
    assert used["stack"] == 0, used
    assert used["shared"] <= aot.SHARED_LIMIT[arch], used
    assert used["registers"] <= 128, used


def test_rope3d_per_head_and_inverse_fit():
    used = aot.resources(rope3d(90, "bf16", 64, inverse=True, per_head=True))
    assert used["stack"] == 0, used


@pytest.mark.skipif(importlib.util.find_spec("evaat_fast._cuda") is None, reason="built without nvcc")
def test_cuda_kernels_fit_and_move_16_bytes_per_access():
    from evaat_fast import _cuda

    kernels = aot.module_resources(_cuda.__file__)
    rope = {name: used for name, used in kernels.items() if "rope3d" in name[1]}
    assert len(rope) >= 2 * 12 and all(used["stack"] == 0 for used in kernels.values())
    # 256 threads a block: two blocks an SM at least.
    assert all(used["registers"] <= 128 for used in rope.values()), rope
    packed = [k for k in kernels if "rope3d_kernelI13__nv_bfloat16Lb1ELi4E" in k[1]]
    assert packed, "the name of the kernel for interleaved bfloat16 has changed"
    for arch, name in packed:
        code = aot.module_instructions(_cuda.__file__, arch, name)
        assert aot.global_access(code) == {"load": {128}, "store": {128}}
        first_store = next(i for i, line in enumerate(code) if line.startswith("STG"))
        assert not any(line.startswith("LDG") for line in code[first_store:]), "a load waits for a store"


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("out,grid", [("fp32", False), ("fp64", True)])
def test_rope3d_table_fits(arch, out, grid):
    from evaat_fast.kernels.rope3d_table import BLOCK, rope3d_table_kernel

    pointers = {"freqs": "*fp32", "positions": "*fp32", "out": f"*{out}"}
    integers = "freqs_h positions_b positions_n positions_axis out_half out_b out_h M Hp Wp".split()
    constants = dict(C=32, GRID=grid, BLOCK_M=BLOCK // 32, BLOCK_C=32)
    used = aot.resources(aot.build(rope3d_table_kernel, pointers | dict.fromkeys(integers, "i32"), constants, arch))
    assert used["stack"] == 0 and used["registers"] <= 128, used
