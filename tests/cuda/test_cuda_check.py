import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tools" / "cuda_check.py")
assert spec is not None and spec.loader is not None
cuda_check = importlib.util.module_from_spec(spec)
sys.modules["cuda_check"] = cuda_check
spec.loader.exec_module(cuda_check)

needs_nvcc = pytest.mark.needs("nvcc")

# Captured from nvcc 13.0; the figures of the first kernel come from a version that spilled.
SAMPLE = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN7bdprune4cuda57_GLOBAL__N__8bcf65c4_18_channel_moments_cu_cca6fd29_1377912cross_kernelIfLb0EEEvPKT_NS1_9MapLayoutEPKdPdl' for 'sm_90'
ptxas info    : Function properties for _ZN7bdprune4cuda57_GLOBAL__N__8bcf65c4_18_channel_moments_cu_cca6fd29_1377912cross_kernelIfLb0EEEvPKT_NS1_9MapLayoutEPKdPdl
    32 bytes stack frame, 64 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 32 bytes cumulative stack size, 17920 bytes smem
ptxas info    : Compile time = 30.125 ms
ptxas info    : Compiling entry function '_ZN7bdprune4cuda57_GLOBAL__N__8bcf65c4_18_channel_moments_cu_cca6fd29_1377917merge_sums_kernelEPKdS3_PdS4_ll' for 'sm_80'
ptxas info    : Function properties for _ZN7bdprune4cuda57_GLOBAL__N__8bcf65c4_18_channel_moments_cu_cca6fd29_1377917merge_sums_kernelEPKdS3_PdS4_ll
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 2.108 ms
"""  # noqa: E501


def test_parse_ptxas():
    cross, merge = cuda_check.parse_ptxas(SAMPLE)
    assert (cross.arch, cross.registers, cross.stack, cross.spill_stores, cross.spill_loads, cross.shared) == (
        ("sm_90", 128, 32, 64, 60, 17920)
    )
    assert (merge.arch, merge.registers, merge.stack, merge.spill_stores, merge.spill_loads, merge.shared) == (
        ("sm_80", 32, 0, 0, 0, 0)
    )
    assert cross.spills and not merge.spills


def test_parse_ptxas_rejects_unknown_lines():
    with pytest.raises(ValueError, match="unexpected ptxas output"):
        cuda_check.parse_ptxas("ptxas info : Compiling entry function 'f' for 'sm_90'\nUsed many registers\n")
    assert cuda_check.parse_ptxas("ptxas info : 28 bytes gmem\n") == []


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        (
            "void bdprune::cuda::(anonymous namespace)::cross_kernel<c10::Half, true>(c10::Half const*, double*, long)",
            "cross_kernel<Half, true>",
        ),
        ("bdprune::cuda::(anonymous namespace)::merge_sums_kernel(double const*)", "merge_sums_kernel"),
        (
            "void cuda::(anonymous namespace)::conv_kernel<(cuda::(anonymous namespace)::Math)1, true>(int)",
            "conv_kernel<(Math)1, true>",
        ),
        ("_Z1fv", "_Z1fv"),
    ],
)
def test_short_name(signature, name):
    assert cuda_check.short_name(signature) == name


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not on PATH")
def test_report_names_the_spilling_kernel(capsys):
    compiled = cuda_check.Compilation(Path("a.cu"), tuple(cuda_check.parse_ptxas(SAMPLE)), "")
    assert cuda_check.report([compiled], every_variant=True) == 1
    printed = capsys.readouterr().out
    assert "spills registers: cross_kernel<float, false> (sm_90)" in printed
    assert "1 of 1 sources compile, 2 kernels, 1 of them spill" in printed
    row = next(line for line in printed.splitlines() if line.startswith("cross_kernel"))
    assert row.split()[-6:] == ["sm_90", "1", "128", "32", "124", "17920"]


def test_report_without_spills(capsys):
    compiled = cuda_check.Compilation(Path("a.cu"), tuple(cuda_check.parse_ptxas(SAMPLE)[1:]), "")
    assert cuda_check.report([compiled], every_variant=False) == 0
    failed = cuda_check.Compilation(Path("b.cu"), (), "error: expected a ;")
    assert cuda_check.report([compiled, failed], every_variant=False) == 1
    assert "b.cu does not compile:\nerror: expected a ;" in capsys.readouterr().out


def test_a_missing_nvcc_is_reported_with_a_fix(monkeypatch, capsys):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda_check.main([]) == 2
    message = capsys.readouterr().err
    assert "nvcc was not found" in message and "install a CUDA toolkit" in message


@needs_nvcc
def test_a_source_that_does_not_compile(tmp_path, capsys):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken_kernel(float* x) { x[0] = undeclared; }\n")
    assert cuda_check.main([str(source), "--arch", "90"]) == 1
    assert "undeclared" in capsys.readouterr().out


@needs_nvcc
def test_a_kernel_that_spills(tmp_path, capsys):
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spilling_kernel(double* x) {\n"
        "  double v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  for (int k = 1; k < 64; ++k)\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + v[(i + 29) % 64];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];\n"
        "}\n"
    )
    assert cuda_check.main([str(source), "--arch", "90"]) == 1
    assert "1 of them spill" in capsys.readouterr().out


@needs_nvcc
def test_our_spectral_norms_compile_without_spills(capsys):
    # One source on one architecture; `make cuda-check` compiles all.
    assert cuda_check.main([str(ROOT / "csrc/cuda/filter_spectral_norms.cu"), "--arch", "90"]) == 0
    assert "norms_kernel" in capsys.readouterr().out
