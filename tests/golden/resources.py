"""What the compilers make of the GPU kernels, as a table.

    cd tests && python -m golden.resources

writes resources.md beside this file. A cell is registers per thread / bytes of shared memory per block / machine
instructions / instructions of the inner loop (see aot.inner_loop). Only Gluon's have a stack. The numbers are those of one
version of Triton and of one nvcc; tests/test_aot.py compares them where the versions are the same.
"""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import aot
from aot_kernels import HOPPER, SHIPPED, listing, used

TABLE = Path(__file__).with_suffix(".md")
EXECUTED = "Executed instructions a pair,"
EXPLAINED = "Of a whole tile, E 256 (`executed` in tests/aot.py): all / products and their operands / other loads and stores."


def triton_version():
    return f"Triton {importlib.metadata.version('triton')}"


def nvcc_version():
    """The nvcc of the machine, which built `_cuda` if there is one; None without."""
    try:
        listing = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"nvcc {re.search(r'V([0-9.]+)', listing)[1]}"


def triton_cell(name, arch):
    return aot.cell(used(name, arch), listing(name, arch), 12 if name in HOPPER else 1)


def cuda_rows():
    """{kernel: {"sm_90": cell}} of the CUDA C++ kernels, for the architectures that they were built for."""
    from evaat_fast import _cuda

    rows, listings = {}, aot.module_listings(_cuda.__file__)
    for (arch, name), resources in aot.module_resources(_cuda.__file__).items():
        rows.setdefault(aot.plain_name(name), {})[arch.rstrip("a")] = aot.cell(resources, listings[arch, name])
    return dict(sorted(rows.items()))


# Sources of labels of sms_kernel, by the number of csrc/pairwise/sms.h, and rows of 256 elements.
SOURCES = {"one": 0, "dense": 1, "indexed": 2, "indexed codes": 3, "verbs and nouns": 4, "one, and one own": 6}


def executed_rows():
    """{"sms_kernel bf16, SOURCE": {"sm_90": cell}}: of a whole tile, instructions a pair, and those of its kinds."""
    from evaat_fast import _cuda

    rows = {}
    for (arch, name), code in aot.module_listings(_cuda.__file__, True).items():
        match = re.search(r"sms_kernel<(__nv_bfloat16|__half), (\d), false", aot.plain_name(name))
        if match:
            path, (T, source) = aot.executed(code), match.groups()
            kinds = {"product": "HMMA|LDSM", "memory": "LDG|LDS$|STG|STS|LDGSTS"}
            count = lambda pattern, path=path: sum(bool(re.match(f"({pattern})", x.split()[0].split(".")[0])) for x in path)  # noqa: E731
            numbers = [len(path), *map(count, kinds.values())]
            label = next(x for x, number in SOURCES.items() if number == int(source))
            of_it = rows.setdefault(f"sms_kernel<{T}>, {label}", {})
            of_it[arch.rstrip("a")] = " / ".join(f"{n / PAIRS_OF_A_THREAD:.1f}" for n in numbers)
    return dict(sorted(rows.items()))


PAIRS_OF_A_THREAD = 128 * 128 // 256  # in a tile


def read():
    """{compiler: {kernel: {"sm_90": cell}}} of the committed table."""
    tables, rows = {}, {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(line[3:], {})
        elif line.startswith("| ") and not line.startswith("| kernel"):
            name, *cells = (x.strip() for x in line.strip("|").split(" | "))
            rows[name] = {f"sm_{a}": c for a, c in zip(aot.ARCHS, cells, strict=True)}
    return tables


def main():
    heads = [f"sm_{arch}" for arch in aot.ARCHS]
    triton = {name: {f"sm_{arch}": triton_cell(name, arch) for arch in aot.ARCHS} for name in SHIPPED}
    triton |= {name: dict.fromkeys(heads, "") | {"sm_90": triton_cell(name, 90)} for name in HOPPER}
    lines = ["# What the compilers make of the GPU kernels", ""]
    lines += ["Registers per thread / bytes of shared memory per block / machine instructions / those of the inner loop.", ""]
    counted = (f"{EXECUTED} {nvcc_version()}", executed_rows())
    for compiler, rows in ((triton_version(), triton), (nvcc_version(), cuda_rows()), counted):
        lines += [
            f"## {compiler}",
            "",
            *([EXPLAINED, ""] if rows is counted[1] else []),
            f"| kernel | {' | '.join(heads)} |",
            "|---|" + "---|" * len(heads),
        ]
        lines += [f"| {name} | {' | '.join(cells[head] for head in heads)} |" for name, cells in rows.items()] + [""]
    TABLE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
