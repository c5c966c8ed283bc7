"""The whole build: `_cpu` always, `_cuda` where nvcc is found. Neither needs torch, so neither breaks when torch changes.

EVAAT_FAST_CUDA=0 skips `_cuda`, =1 fails without nvcc. EVAAT_FAST_CUDA_ARCHS (else TORCH_CUDA_ARCH_LIST) lists
architectures as torch does: "8.0;9.0a;10.0+PTX". MAX_JOBS bounds the compilers that run at once.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"


def find_nvcc():
    wish = os.environ.get("EVAAT_FAST_CUDA", "")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise RuntimeError("EVAAT_FAST_CUDA=1, but there is no nvcc on PATH or in $CUDA_HOME/bin")
    if nvcc is None:
        print("evaat-fast: no nvcc found, building without evaat_fast._cuda")
    return nvcc


def gencode(nvcc):
    """-gencode flags for the wanted architectures that this nvcc knows; an architecture named by the user must be known."""
    named = os.environ.get("EVAAT_FAST_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(n) for n in re.findall(r"compute_(\d+)", listing)}
    flags = []
    for arch in re.split(r"[;,\s]+", (named or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise RuntimeError(f"CUDA architecture {arch!r}: expected the form of '9.0a' or '10.0+PTX'")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) not in known:
            if named:
                raise RuntimeError(f"{nvcc} knows no architecture {arch!r}; it knows {sorted(known)}")
            continue
        name = major + minor + suffix
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    if not flags:
        raise RuntimeError(f"{nvcc} knows none of {DEFAULT_ARCHS}; set EVAAT_FAST_CUDA_ARCHS or EVAAT_FAST_CUDA=0")
    return flags


def toolkit_root(nvcc):
    """nvcc may be a wrapper script, so ask it where it lives. Its dry run prints `#$ TOP=...`, relative to its own folder."""
    run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"#\$ TOP=(.*)", run.stderr)
    return Path(top[1].strip()) if top else Path(nvcc).resolve().parents[1]


def has_openmp(cxx):
    probe = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    run = subprocess.run([*cxx, "-fopenmp", "-x", "c++", "-", "-o", os.devnull], input=probe, text=True, capture_output=True)
    return run.returncode == 0


class NinjaBuild(build_ext):
    """Writes one build.ninja per extension, so that g++ and nvcc run in parallel and a rebuild compiles what changed."""

    def folder(self, name):
        """Where objects stay from one build to the next: setuptools' own folder is a new one in each editable install."""
        kept = ROOT.resolve() / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / name
        for folder in (kept, Path(self.build_temp).resolve() / name):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
            except OSError:
                continue
        raise RuntimeError(f"neither {kept} nor {self.build_temp} can be written")

    def build_extension(self, ext):
        if sys.platform == "win32":
            return super().build_extension(ext)
        gencode_flags = gencode(NVCC) if any(s.endswith(".cu") for s in ext.sources) else []
        import pybind11

        build = self.folder(ext.name)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++").split()
        openmp = ["-fopenmp"] if has_openmp(cxx) else []
        includes = [f"-I{p}" for p in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
        # -ffp-contract=off: a plain C++ path must round as the specification does on every machine.
        # -fno-trapping-math changes no result; with it a loop with a comparison vectorises.
        cxxflags = "-O3 -std=c++17 -fPIC -fvisibility=hidden -g0 -Wall -ffp-contract=off -fno-trapping-math".split()
        cxxflags += [*openmp, *includes]
        codes = " ".join(flag.rpartition("=")[2] for flag in gencode_flags)
        cxxflags += [f"'-DEVAAT_CODES=\"{codes}\"'"] if codes else []
        link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-s"]
        link += [*openmp, *os.environ.get("LDFLAGS", "").split()]
        rules = [
            "ninja_required_version = 1.5",
            f"rule cxx\n command = {' '.join(cxx)} -MMD -MF $out.d {' '.join(cxxflags)} "
            f"{os.environ.get('CXXFLAGS', '')} -c $in -o $out\n depfile = $out.d\n deps = gcc\n description = c++ $in",
        ]
        if gencode_flags:
            root = toolkit_root(NVCC)
            libraries = next((root / p for p in ("lib64", "lib", "targets/x86_64-linux/lib") if (root / p).is_dir()), None)
            if libraries is None:
                raise SystemExit(f"no library folder under the CUDA toolkit {root}: set CUDA_HOME, or EVAAT_FAST_CUDA=0")
            ccache = [c for c in [shutil.which("ccache")] if c]
            flags = ["-O3", "-std=c++17", "-lineinfo", f"-I{ROOT / 'csrc'}", *gencode_flags]
            flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=--warn-on-spills"]
            rules.append(
                f"rule nvcc\n command = {' '.join([*ccache, NVCC])} -MMD -MF $out.d {' '.join(flags)} -c $in -o $out\n"
                " depfile = $out.d\n deps = gcc\n description = nvcc $in"
            )
            # The static runtime: the module imports on a machine without a driver, and needs no CUDA of torch's version.
            link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        rules.append(f"rule link\n command = {' '.join(cxx)} $in -o $out {' '.join(link)}\n description = link $out")
        objects = []
        for source in ext.sources:
            out = "_".join(Path(source).parts[1:]) + ".o"  # csrc/rope3d/rope3d.cu -> rope3d_rope3d.cu.o
            rules.append(f"build {out}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ROOT.resolve() / source}")
            objects.append(out)
        rules.append(f"build {target}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(min(4, os.cpu_count() or 1))
        subprocess.run([ninja_command(), "-C", str(build), "-j", jobs], check=True)


def ninja_command():
    """The ninja of the build environment, which need not be on PATH when a front end runs us by an absolute python."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if shutil.which("ninja"):
            return "ninja"
        raise RuntimeError("ninja is missing: pip install ninja") from None


NVCC = find_nvcc()


def sources(pattern):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(pattern))


extensions = [Extension("evaat_fast._cpu", sources("*_cpu.cpp"))]
if NVCC:  # first, so that a wrong architecture is told before anything is compiled
    extensions.insert(0, Extension("evaat_fast._cuda", ["csrc/bind_cuda.cpp", *sources("*.cu")]))

kernels = ["evaat_fast.kernels", *(f"evaat_fast.kernels.{p}" for p in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["evaat_fast", "evaat_fast.*"]), *kernels],
    package_dir={"evaat_fast": "evaat_fast", "evaat_fast.kernels": "kernels"},
    package_data={
        "evaat_fast": ["py.typed", "*.pyi"],
        "evaat_fast.model": ["*.txt", "*.gz"],
        "evaat_fast.search": ["*.html", "web/*"],
        "evaat_fast.train": ["*.html", "*.toml"],
        "evaat_fast.train.recipes": ["*.toml"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
