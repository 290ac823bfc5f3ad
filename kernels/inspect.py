"""What every kernel costs on a GPU that need not be there: python -m kernels.inspect

Compiles each kernel and variant ahead of time for Ampere, Hopper and Blackwell and reads the
machine code: registers, stack, spills, the width of loads and stores. Exits with code 1 where one
spills, uses a stack, exceeds its register budget, or loads less than 16 bytes at a time although
the sizes allow it. Compiled code is kept in Triton's cache, so that the second time is quick.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

BUDGET = 128  # registers per thread: 512 threads share an SM's 65,536


@dataclass(frozen=True)
class Variant:
    """A kernel with its types and compile-time values.

    types: of each runtime argument, "*bf16" or "i32". aligned: arguments that are multiples of 16.
    wide: the instruction that must take 16 bytes at a time, LDG or STG. passes: reads and writes of
    a whole tensor, its floor.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    aligned: tuple[str, ...] = ()
    wide: str = "LDG"
    passes: int = 0

    @property
    def floor(self) -> str:
        """Bytes per element that the kernel must move, over all its passes."""
        sizes = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*u8": 1}
        size = min(sizes.get(t, 4) for t in self.types.values())
        return f"{self.passes * size} B ({self.passes} x {size})"


@dataclass(frozen=True)
class Usage:
    """What a compiled variant uses."""

    name: str
    target: int
    registers: int
    stack: int
    spills: int
    loads: str
    floor: str
    breach: str


@dataclass(frozen=True)
class Command:
    """What to compile."""

    targets: Annotated[tuple[Literal[80, 90, 100], ...], tyro.conf.arg(aliases=("--sm",))] = (
        *(80, 90, 100),
    )
    """Compute capabilities, times ten: 80 is Ampere, 90 Hopper, 100 Blackwell."""
    only: str = ""
    """Variants whose name contains this."""
    jobs: int = 2
    """Compilations at a time."""


def variants() -> list[Variant]:
    """Every variant of every kernel."""
    from kernels import batchnorm_variants, loss_variants

    return [*batchnorm_variants.variants(), *loss_variants.variants()]


def compiled(variant: Variant, target: int) -> bytes:
    """Machine code for a compute capability (times ten)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={n: "constexpr" if n in variant.constants else variant.types[n] for n in names},
        constexprs={(names.index(n),): v for n, v in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned},
    )
    options = {"num_warps": variant.warps}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return kernel.asm["cubin"]


def read(variant: Variant, target: int) -> Usage:
    """Compile a variant and read its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(variant, target))
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{n}:(\d+)", resources)[1]) for n in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    accesses = sorted(set(re.findall(r"\b(?:LDG|STG)[.\w]*", code)))
    loads = " ".join(
        a.replace(".E", "").replace("LDG", "ld").replace("STG", "st") for a in accesses
    )
    breach = _breach(variant, registers, stack, spills, code)
    return Usage(variant.name, target, registers, stack, spills, loads, variant.floor, breach)


def _breach(variant: Variant, registers: int, stack: int, spills: int, code: str) -> str:
    if stack or spills:
        return f"{spills} spills, {stack} bytes of stack"
    if registers > BUDGET:
        return f"{registers} registers, more than {BUDGET}"
    if not re.search(rf"\b{variant.wide}[.\w]*\.128", code):
        return f"no {variant.wide} of 16 bytes"
    return ""


def _tool(name: str, *arguments: str) -> str:
    """Output of one of NVIDIA's tools, which Triton's wheel carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def inspect(command: Command) -> Iterator[Usage]:
    """What each variant uses on each target, as they are done."""
    chosen = [v for v in variants() if command.only in v.name]
    work = [(v.name, t) for t in command.targets for v in chosen]
    with ProcessPoolExecutor(command.jobs) as pool:
        yield from pool.map(_by_name, *zip(*work, strict=True)) if work else ()


def _by_name(name: str, target: int) -> Usage:
    return read(next(v for v in variants() if v.name == name), target)


def main() -> int:
    """Print the table; the exit code."""
    command = tyro.cli(Command, prog="python -m kernels.inspect", description=__doc__)
    table = Table("kernel", "sm", "registers", "spills", "stack", "accesses", "floor", "breach")
    usages = list(inspect(command))
    for u in usages:
        numbers = (str(n) for n in (u.target, u.registers, u.spills, u.stack))
        table.add_row(u.name, *numbers, u.loads, u.floor, u.breach)
    Console(width=160).print(table)
    breaches = sum(bool(u.breach) for u in usages)
    print(f"{len(usages)} compiled, {breaches} beyond a limit")
    return 1 if breaches or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
