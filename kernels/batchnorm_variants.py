"""Every variant of the BatchNorm kernels, for `kernels.inspect`."""

from collections.abc import Iterator

from kernels import batchnorm_triton as k
from kernels.batchnorm_launch import TILE, WHOLE, WHOLE_GRADIENT
from kernels.inspect import Variant

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
TENSORS = ("x", "y", "saved", "dy", "dx")
WHOLES = ("weight", "bias", "part", "stats", "gradients")
NUMBERS = ("N", "C", "S", "tiles", "splits", "parts", "count")
# Compile-time values beside the tile's, and element-passes (reads + writes of a tensor).
TILED = {
    "statistics": (k.statistics, {"EVEN": (True, False)}, 1),
    "apply": (k.apply, {"AFFINE": (True, False), "MERGE": (True, False)}, 2),
    "sums": (k.sums, {"AFFINE": (True,), "OUTPUT": (False, True), "FIXED": (False, True)}, 2),
    "apply_gradient": (
        k.apply_gradient,
        {"AFFINE": (True,), "OUTPUT": (False, True), "SHARED": (False, True)},
        3,
    ),
}


def variants() -> list[Variant]:
    """Two-pass kernels in both layouts, one-pass kernels at each size; three dtypes."""
    return [v for dtype in DTYPES for v in (*_tiled(dtype), *_whole(dtype))]


def _tiled(dtype: str) -> Iterator[Variant]:
    for name, (kernel, flags, passes) in TILED.items():
        for last in (False, True):
            tile = {"ROWS": TILE // 64, "COLUMNS": 64} if last else {"ROWS": 1, "COLUMNS": TILE}
            for chosen in _combinations(flags):
                constants = {**tile, "LAST": last, **chosen}
                label = "NHWC" if last else "NCHW"
                named = "".join(f" {n.lower()}" for n, v in chosen.items() if v)
                moved = passes + bool(chosen.get("FIXED"))
                variant = f"{name} {dtype} {label}{named}"
                yield _variant(variant, kernel, dtype, constants, moved)


def _whole(dtype: str) -> Iterator[Variant]:
    for size in sorted({2048, 8192, WHOLE_GRADIENT, WHOLE[DTYPES[dtype]]}):
        tile = {"ROWS": 128, "COLUMNS": size // 128, "AFFINE": True}
        warps = min(max(size // 1024, 4), 32)
        yield _variant(f"whole {dtype} {size}", k.whole, dtype, tile, 2, warps)
        if size <= WHOLE_GRADIENT:
            for output in (False, True):
                name = f"whole_gradient {dtype} {size}{' output' if output else ''}"
                constants = tile | {"OUTPUT": output}
                yield _variant(name, k.whole_gradient, dtype, constants, 3, warps)


def _combinations(flags: dict[str, tuple[bool, ...]]) -> Iterator[dict[str, bool]]:
    if not flags:
        yield {}
        return
    name, values = next(iter(flags.items()))
    for rest in _combinations({n: v for n, v in flags.items() if n != name}):
        for value in values:
            yield {name: value} | rest


def _variant(
    name: str, kernel: object, dtype: str, constants: dict, passes: int, warps: int = 4
) -> Variant:
    types = {}
    for argument in kernel.arg_names:
        if argument in TENSORS:
            types[argument] = f"*{dtype}"
        elif argument in WHOLES or (argument == "count" and constants.get("SHARED")):
            types[argument] = "*fp32"
        elif argument in NUMBERS:
            types[argument] = "i32"
        elif argument not in constants:
            types[argument] = "fp32"
    aligned = tuple(a for a in types if types[a][0] == "*" or a in ("N", "C", "S"))
    return Variant(name, kernel, types, constants, warps, aligned, passes=passes)
