"""What bench/train.py adds to its times: where they go, and the largest batch that trains."""

import ast
import gc
import importlib
import json
import re
import weakref
from pathlib import Path

import pytest
import torch

import evaat_fast.ops  # noqa: F401 registers the operators

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


pytestmark = pytest.mark.usefixtures("bench_on_path")


@pytest.fixture
def where():
    return importlib.import_module("where")


@pytest.fixture
def largest():
    return importlib.import_module("largest")


ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::%s, std::array<char*, 3ul> >(int, at::native::%s)"
REDUCE = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::%s, unsigned int, float, 4, 4> >(%s)"
SUM = "func_wrapper_t<float, at::native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda()#1}>"
NAMES = {
    "matrix products": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_TNN",
        "nvjet_sm100_tst_64x16_64x16_2x4_2cta_h_bz_splitK_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_32x3_nn_align4>(cutlass_80_tensorop_s1688gemm::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>(float*)",
        "ampere_sgemm_128x64_nn",
        "triton_tem_fused_addmm_0",
        "aten::mm",
        "aten::addmm",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(cudnn::fusion::Params)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bfloat16_t>>(int)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128> >(int)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "attn_sums_kernel",
    ],
    "norms, SwiGLU, GELU": [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float)",
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float, float, false>(float const*)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 1u, 32u, true>(long)",
        "void at::native::(anonymous namespace)::cuComputeGradInput<float, float, false>(float const*)",
        ELEMENTWISE % (("(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)::{lambda()#1}",) * 2),
        ELEMENTWISE % (("GeluBackwardCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#1}",) * 2),
        "triton_red_fused__to_copy_add_native_layer_norm_native_layer_norm_backward_30",
        "triton_poi_fused_mul_silu_silu_backward_3",
        "aten::native_layer_norm_backward",
        "sums_kernel",
    ],
    "rotation": [
        "rope3d_kernel",
        "void (anonymous namespace)::rope3d_kernel<__nv_bfloat16, 4>(Rotation)",
        "evaat_fast::rope3d_",
    ],
    "casts and copies": [
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda("
        "at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(c10::BFloat16)#1}>(at::TensorIteratorBase&)",
        ELEMENTWISE % (("bfloat16tofloat32_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(c10::BFloat16)#1}",) * 2),
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<at::native::OpaqueType<2u>, unsigned int>",
        ELEMENTWISE % (("FillFunctor<float>",) * 2),
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "triton_poi_fused__to_copy_2",
        "aten::copy_",
    ],
    "bias gradients (sums)": [REDUCE % (SUM, SUM), "triton_red_fused__to_copy_sum_5", "aten::sum"],
    "loss": [
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>(int)",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>(float*)",
        REDUCE % (("NormTwoOps<float, float, float>",) * 2),
        "contrast_slopes_kernel",
        "prepare_kernel",
        "evaat_fast::contrast_step",
    ],
    "optimiser": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>, float*>(int)",
        "aten::_fused_adamw_",
        "Optimizer.step#AdamW.step",
    ],
    "element-wise passes": [
        ELEMENTWISE % (("BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >",) * 2),
        ELEMENTWISE % (("CUDAFunctor_add<float>",) * 2),
        "triton_poi_fused_add_cat_mul_neg_stack_7",
        "aten::mul",
    ],
    "everything else": [
        REDUCE % (("MeanOps<float, float, float, float>",) * 2),
        "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float, float, long>(long const*, float*)",
        "aten::empty",
        "MeanBackward1",
    ],
}


def test_groups_of_names_that_libraries_give_their_kernels(where):
    assert set(NAMES) == {*where.GROUPS, where.REST}
    wrong = {name: where.group_of(name) for group, names in NAMES.items() for name in names if where.group_of(name) != group}
    assert not wrong


def triton_kernels():
    """The functions under @triton.jit that no other one calls."""
    jitted, called = {}, set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list):
                jitted[node.name] = path.parent.name
                called |= {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return {name: op for name, op in jitted.items() if name not in called}


def test_every_kernel_of_ours_has_the_group_of_its_op(where):
    groups = {
        "attn": "attention",
        "rope3d": "rotation",
        "norm": "norms, SwiGLU, GELU",
        "pairwise": "loss",
        "patchify": "casts and copies",
    }
    ours = triton_kernels()
    for path in (ROOT / "csrc").rglob("*.cu"):
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", path.read_text())
        assert len(names) == path.read_text().count("__global__")
        ours |= {f"void (anonymous namespace)::{name}<float, 4>(int)": path.parent.name for name in names}
    for path in (ROOT / "evaat_fast" / "ops").rglob("*.py"):
        for name in re.findall(r"^class (\w+)\(torch\.autograd\.Function\)", path.read_text(), re.MULTILINE):
            names = name, f"{name}Backward", f"autograd::engine::evaluate_function: {name}Backward"
            ours |= dict.fromkeys(names, path.parent.name)
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("evaat_fast::")]
    assert {"attn_forward_kernel", "sums_kernel", "contrast_totals_kernel"} <= set(ours) and len(operators) > 10
    wrong = {name: where.group_of(name) for name, op in ours.items() if where.group_of(name) != groups[op]}
    assert not wrong
    assert where.REST not in {where.group_of(name) for name in operators}


def test_a_trace_is_what_ran_on_the_device(where):
    kernel = lambda name, ts, dur, cat="kernel": {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}  # noqa: E731
    events = [
        kernel("nvjet_a", 3000.0, 1000.0),  # begins before the copy has ended
        kernel("Memcpy DtoD (Device -> Device)", 2500.0, 1000.0, "gpu_memcpy"),
        kernel("nvjet_a", 1000.0, 500.0),
        kernel("odd_kernel", 6000.0, 100.0),
        kernel("Optimizer.step#AdamW.step", 0.0, 9000.0, "gpu_user_annotation"),
        kernel("cudaLaunchKernel", 0.0, 9.0, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    found, busy = where.of_trace(events)
    assert found == {"nvjet_a": (1.5, 2), "Memcpy DtoD (Device -> Device)": (1.0, 1), "odd_kernel": (0.1, 1)}
    assert busy == pytest.approx(2.1)
    kept = where.grouped(found, busy, 2, 4.2)
    assert kept["ms"] == {"matrix products": 0.75, "casts and copies": 0.5, "everything else": 0.05}
    assert kept["calls"] == {"matrix products": 1, "casts and copies": 0.5, "everything else": 0.5}
    assert kept["total_ms"] == pytest.approx(1.3) and kept["busy"] == pytest.approx(0.25)
    assert kept["rest"] == ["odd_kernel 0.0500 ms"]
    with pytest.raises(RuntimeError, match="no kernel"):
        where.of_trace(events[4:])


def test_committed_groups_sum_to_the_total(where):
    for path in ROOT.glob("bench/results/*/train.json"):
        for r in json.loads(path.read_text())["records"]:
            if "ms" in r.get("where", {}):
                assert sum(r["where"]["ms"].values()) == pytest.approx(r["where"]["total_ms"], rel=1e-2)
                assert set(r["where"]["ms"]) <= {*where.GROUPS, where.REST}


@pytest.mark.parametrize("good", [0, 7, 8, 9, 64, 71, 552, 1000, 5000])
@pytest.mark.parametrize("guess", [-50, 0, 8, 64, 540, 560.7, 1000, 1e6])
def test_bracket_finds_the_last_batch_that_fits(largest, good, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= good

    known = 64 if good >= 64 else 0
    found = largest.bracket(fits, guess, low=known, tries=100)
    assert found == largest.Bracket(good // 8 * 8, good // 8 * 8 + 8)
    assert len(set(tried)) == len(tried) <= 24 and all(batch % 8 == 0 and batch > known for batch in tried)
    if abs(good - guess) < 8 and good > 64:
        assert len(tried) <= 3


def test_bracket_stops(largest):
    assert largest.bracket(lambda batch: True, 100, most=400) == largest.Bracket(400, None)
    assert largest.bracket(lambda batch: True, 1e9, most=400) == largest.Bracket(400, None)
    assert largest.bracket(lambda batch: False, 100, tries=2) == largest.Bracket(0, 88)
    assert largest.bracket(lambda batch: False, 8) == largest.Bracket(0, 8)
    assert largest.bracket(lambda batch: batch <= 100, 50, low=8, high=400, tries=3) == largest.Bracket(48, 136)
    left = iter([True, True, False])
    found = largest.bracket(lambda batch: batch <= 1000, 100, low=64, goes_on=lambda: next(left))
    assert found == largest.Bracket(104, None)


def test_a_guess_from_two_peaks(largest):
    assert largest.predicted({64: 20e9, 8: 6e9}, 120e9) == pytest.approx(464)
    assert largest.predicted({64: 20e9, 8: 20e9}, 30e9) > 1e9, "no slope, no division by 0"


def test_reasons(largest):
    def hidden():
        try:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        finally:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    def cublas():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    assert largest.attempt(lambda batch: hidden(), 8) == largest.attempt(lambda batch: cublas(), 8) == "out of memory"
    assert largest.attempt(lambda batch: [][batch], 8) == "IndexError: list index out of range"
    assert largest.attempt(lambda batch: None, 8) is None


def test_a_failed_try_holds_nothing(largest):
    alive = []

    def trains(batch):
        activations = torch.zeros(batch)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(f"no room beside {activations.shape}")

    assert largest.attempt(trains, 8) == "out of memory"
    gc.collect()
    assert alive[0]() is None


class Machine:
    """A training and its memory: 4 GiB of parameters, a quarter of a GiB a clip, and what failed tries leave behind."""

    def __init__(self, room, leak=0.0, breaks=10**9):
        self.room, self.leak, self.breaks = room, leak, breaks
        self.B, self.held, self.tried = 64, 4 * GIB, []

    def resize(self, B):
        self.B = B
        self.tried.append(B)

    def drop(self):
        self.B = 1

    def step(self):
        if self.B >= self.breaks:
            raise ValueError("more rows than a kernel counts")
        if self.held + self.B * GIB / 4 > self.room * GIB:
            self.held += self.leak * GIB
            raise torch.OutOfMemoryError

    def reset(self):
        pass

    def peak(self):
        return self.held + self.B * GIB / 4

    def limit(self):
        return self.room * GIB

    def release(self):
        return self.held


def test_search(largest):
    search = lambda machine, batch=64: largest.search(machine, batch, lambda: True, machine)  # noqa: E731
    assert search(Machine(140)) == {"B": 544, "tries": 8, "fails": 552, "why": "out of memory"}
    assert search(Machine(10)) == {"B": 24, "tries": 4, "fails": 32, "why": "out of memory"}
    assert search(Machine(5)) == {"B": 0, "tries": 1, "fails": 8, "why": "out of memory"}
    assert search(Machine(8), batch=8) == {"B": 16, "tries": 3, "fails": 24, "why": "out of memory"}
    assert search(Machine(7), batch=8) == {"B": 8, "tries": 2, "fails": 16, "why": "out of memory"}
    counted = search(Machine(140, breaks=300))
    assert (counted["B"], counted["fails"], counted["why"]) == (296, 304, "ValueError: more rows than a kernel counts")


def test_a_search_stops_where_memory_was_not_freed(largest):
    machine = Machine(140, leak=20)
    found = largest.search(machine, 64, lambda: True, machine)
    assert "left 20.0 GiB behind" in found["stopped"] and found["fails"] == machine.tried[-1]
    assert largest.search(Machine(140, leak=0.5), 64, lambda: True, Machine(140)).get("stopped") is None


TINY = [{"model": "eva02_at_tiny_patch16_64", "B": 2, "T": 2}]


def test_a_run_profiles_what_it_timed(where, tmp_path, capsys, monkeypatch):
    train, plot = (importlib.import_module(name) for name in ("train", "plot"))
    monkeypatch.setattr(train, "CPU_SHAPES", TINY)
    path = tmp_path / "train.json"
    command = [
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--json",
        str(path),
        "--only",
        "authors, eager",
        "ours, eager",
        "ours, CUDA graph",
    ]
    train.main(command)
    first = json.loads(path.read_text())
    assert [("ms" in r, "where" in r) for r in first["records"]] == [(True, False), (True, False), (False, False)]
    train.main([*command, "--append", "--where", "--largest", "--budget", "0"])
    assert json.loads(path.read_text()) == first
    train.main([*command, "--append", "--where", "--largest"])
    assert "not searched on a CPU, whose memory is shared" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert [{k: v for k, v in r.items() if k != "where"} for r in data["records"]] == first["records"]
    authors, ours, graph = (r.get("where") for r in data["records"])
    assert graph is None and "rotation" not in authors["ms"] and ours["ms"]["rotation"] > 0
    for found in (authors, ours):
        assert {"attention", "optimiser", "loss", "matrix products", "norms, SwiGLU, GELU"} <= set(found["ms"])
        assert sum(found["ms"].values()) == pytest.approx(found["total_ms"], rel=1e-2)
        assert len(found["rest"]) == 3 and 0 < found["busy"] <= 1
    page = plot.page_text(data, False)
    assert "| | authors, eager | ours, eager |" in page and "| rotation | – | " in page
    assert "The largest batch is not looked for on a CPU" in page

    data["environment"]["commit"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit):
        train.main([*command, "--append", "--where"])


def test_another_batch_after_a_step_that_was_cut_off(monkeypatch):
    train = importlib.import_module("train")
    training = train.Training(TINY[0], train.Stack(held=True), "cpu", "bf16")
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(training.masters, "take_gradients", lambda: [][0])
        training.step()
    training.drop()
    assert all(p.grad is None for p in (*training.loss.parameters(), *training.parameters))
    training.resize(3)
    assert training.video.shape == (3, 2, 64, 64, 3) and training.tokens.shape == (3, train.CAPTION)
    assert training.step().isfinite()


def test_a_page_shows_the_largest_batch():
    plot = importlib.import_module("plot")
    environment = {"device": "d", "cuda": "13", "clocks": "1, 2, 3", "torch": "t", "triton": "r", "commit": "c"}
    timed = {"shape": {"N": 64}, "dtype": "bf16", "mode": "step", "ms": {"p50": 2.0}, "work": {"flop": 1e9}}
    found = [
        {"B": 544, "tries": 5, "fails": 552, "why": "out of memory"},
        {"B": 296, "tries": 9, "fails": 304, "why": "ValueError: too | many"},
        {"B": 128, "tries": 3},
        {"fail": "RuntimeError: lost"},
    ]
    records = [{**timed, "provider": str(i), "largest": f} for i, f in enumerate(found)] + [{**timed, "provider": "none"}]
    records[0]["where"] = {"fail": "RuntimeError: the profiler saw no kernel"}
    data = {"op": "train", "baseline": "0", "environment": environment, "peak": {"matmul_flop_per_s": 1e15}, "records": records}
    page = plot.page_text(data, False)
    assert (
        "| provider | step | largest batch |" in page and "Not profiled: 0 (RuntimeError: the profiler saw no kernel)." in page
    )
    cells = [line.split(" | ")[-1].removesuffix(" |") for line in page.splitlines() if "2.000 ms" in line]
    wanted = ["544 (552 fails)", "296 (304 fails: ValueError: too / many)", "128 or more", "FAIL: RuntimeError: lost", "–"]
    assert cells == wanted
