"""Compiles Triton kernels for GPUs that are not here and reads what the compiler made of them."""

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path

ARCHS = (80, 90, 100)
# The most shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def build(kernel, signature, constants, arch, aligned=(), **options):
    """Compiles a @triton.jit function.

    kernel: the jitted function. signature: {argument: "*bf16", "i32", ...} of its run-time arguments, of a tuple one for each
    field, or the constant that it is (a string as a tl.constexpr); constants: the others. arch: 80, 90, 100. aligned: the
    integers that are multiples of 16, as Triton finds out at a launch (pointers always are), "x.N" in a tuple. options:
    num_warps, num_stages.
    """
    import triton
    from evaat_fast.kernels.launch import FUSED
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names, given = kernel.arg_names, signature | constants
    missing = set(names) ^ set(given)
    assert not missing, f"arguments not given, or not known: {sorted(missing)}"
    attributes, constexprs = {}, {}

    def kind_of(value, path, name):
        """The type of an argument, or of each field of a tuple of them."""
        if isinstance(value, tuple) and name not in constants:
            fields = getattr(value, "_fields", range(len(value)))
            kinds = [kind_of(x, (*path, i), f"{name}.{field}") for i, (field, x) in enumerate(zip(fields, value, strict=True))]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if name in constants or not isinstance(value, str):
            constexprs[path] = getattr(value, "value", value)
            return "constexpr"
        if value.startswith("*") or name in aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return value

    types = {name: kind_of(given[name], (i,), name) for i, name in enumerate(names)}
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=FUSED | options)


def resources(compiled):
    """{"registers", "stack", "shared"}: per thread, bytes per thread (spills and local arrays), bytes per block."""
    usage = _cuobjdump("-res-usage", compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    local = int(re.search(r"LOCAL:(\d+)", usage)[1])
    return {"registers": registers, "stack": stack + local, "shared": compiled.metadata.shared}


def listing(compiled):
    """The machine code as [(address, "OPCODE.MODIFIERS operands")]."""
    return _listing(_cuobjdump("-sass", compiled.asm["cubin"]))


def _listing(text, predicates=False):
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)
    return [(int(address, 16), code if predicates else _plain(code)) for address, code in found]


def _plain(code):
    return re.sub(r"^@!?U?P\w+\s+", "", code)


def loops(code):
    """The loops of a listing as (first, last) indices, innermost or not: every branch backwards to another address."""
    at = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (address, line) in enumerate(code):
        target = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", line)
        if target and int(target[1], 16) < address:
            found.append((at[int(target[1], 16)], i))
    return found


def inner_loop(code, least=1):
    """The loop that a kernel spends its time in, its instructions: the shortest with so many products, or the longest."""
    bodies = [[line for _, line in code[first : last + 1]] for first, last in loops(code)]
    products = [body for body in bodies if sum(bool(re.match(r"\w*MMA", line)) for line in body) >= least]
    return min(products, key=len) if products else max(bodies, key=len, default=[])


def executed(code, chunks=4):
    """What one pass of sms_kernel's loop over tiles executes, from a listing with predicates, for a whole tile off the diagonal
    whose rows have so many chunks of 64 elements, its captions kept. The first chunk is by itself, the others are a loop. A
    branch is followed where it skips the tiles at an edge or a copy of captions, or is unconditional; traps are not.
    """
    lines = [(address, _plain(line)) for address, line in code]
    at = {address: i for i, (address, _) in enumerate(code)}
    head, tail = max(loops(lines), key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops(lines) if loop != (head, tail)]
    of_chunks = next(x for x in inner if sum("HMMA" in line for _, line in lines[x[0] : x[1]]) >= 32)
    i, passes, copies, path = head, 1, 0, []
    while True:
        line = lines[i][1]
        path.append(line)
        copies = 0 if line.startswith("BAR") else copies + line.startswith("LDGSTS")
        target, following = re.match(r"BRA\S* (.*?)(0x[0-9a-f]+)", line), i + 1
        if i == tail:
            return path
        to = at[int(target[2], 16)] if target else following
        if (to, i) == of_chunks and passes < chunks - 1:
            passes, following = passes + 1, to
        elif to > following and not lines[to][1].startswith("BPT"):
            edge = any(following <= a and b < to for a, b in inner if (a, b) != of_chunks)
            captions = copies >= 4 and sum(x.startswith("LDGSTS") for _, x in lines[following:to]) == 4
            always = code[i][1] == line and "P" not in target[1]
            following = to if edge or captions or always else following
        i = following


def usual(code, products):
    """What one pass of the innermost loop with so many products executes where no branch over many instructions is missed: what
    is rare stands behind such a branch."""
    at = {address: i for i, (address, _) in enumerate(code)}
    sums = lambda first, last: sum("HGMMA" in line for _, line in code[first : last + 1])  # noqa: E731
    i, last = min((x for x in loops(code) if sums(*x) == products), key=lambda x: x[1] - x[0])
    path = []
    while i <= last:
        line = code[i][1]
        path.append(line)
        target = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", line)
        to = at[int(target[1], 16)] if target else i
        i = to if 200 < to - i and to <= last else i + 1
    return path


def cell(used, code, least=1):
    """One cell of golden/resources.md, from `resources` and `listing`."""
    count = sum(not line.startswith("NOP") for _, line in code)
    return f"{used['registers']} / {used['shared']} / {count} / {len(inner_loop(code, least))}"


def global_access(code):
    """The distinct widths in bits of global loads and stores: {"load": {128}, "store": {128}}."""
    widths = {"load": set(), "store": set()}
    for line in code:
        match = re.match(r"(LDG|STG)\.(\S+)", line)
        if match:
            width = re.search(r"\b(128|64|U16|S16|U8|S8)\b", match[2])
            bits = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}[width[1]] if width else 32
            widths["load" if match[1] == "LDG" else "store"].add(bits)
    return widths


@functools.cache
def _tools():
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def module_resources(path):
    """{(arch, kernel): {"registers", "stack", "shared"}} for every kernel of a built CUDA module; arch as in "sm_90a"."""
    found, arch, name = {}, None, None
    for line in _run("-res-usage", path).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[arch, name] = {"registers": registers, "stack": stack + local, "shared": shared}
    return found


@functools.cache
def module_listings(path, predicates=False):
    """{(arch, kernel): listing} of a built CUDA module; with the predicates of its instructions, or without."""
    found, arch, parts = {}, None, re.split(r"(?m)^\s*(?:Function : (\S+)|arch = (sm_\w+)).*$", _run("-sass", path))
    for name, named_arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        arch = named_arch or arch
        if name:
            found[arch, name] = _listing(text, predicates)
    return found


def plain_name(mangled):
    """The template and its arguments, of a mangled name: rope3d_kernel<__nv_bfloat16, true, 4>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |evaat::|\(anonymous namespace\)::|\(.*$", "", re.sub(r"\((bool|int)\)", "", name))


def _cuobjdump(flag, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(flag, file.name)


def _run(*arguments):
    """Runs the cuobjdump of Triton's own wheel, which needs its nvdisasm on PATH."""
    environment = {**os.environ, "PATH": f"{_tools()}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(_tools() / "cuobjdump"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return run.stdout + run.stderr
