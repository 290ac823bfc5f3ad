"""Checks of one machine: versions, GPUs, disks, dataset, compiler, launcher."""

import importlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine import recipe as recipes
from engine.compile import keep_compiled, missing_toolchain
from engine.precision import choose_precision
from engine.world import choose_device
from launch import environment
from launch.findings import FAIL, OK, WARN, Case, Finding
from pipelines.beton import PACKAGES
from pipelines.datasets import DOWNLOADS, BadImage, DatasetMissing, find

INSTALL = {
    "torch": "pip install torch torchvision, both from one index",
    "torchvision": "pip install torch torchvision, both from one index",
    "triton": "pip install triton",
    "nvidia-dali": "pip install 'saddle[dali]' (driver 580 or newer; else 'saddle[dali12]')",
    "ffcv": f"apt-get install {PACKAGES}, then pip install 'saddle[ffcv]'",
    "deepspeed": "pip install 'saddle[deepspeed]'",
    "accelerate": "pip install 'saddle[track]'",
}
DISTRIBUTIONS = {"nvidia-dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120")}
SLOW_WRITE, SLOW_READ = 50e6, 100e6  # bytes per second: a single old hard disk does more
PROBE = 64 * 2**20
LARGE_CACHE = 20e9


# -- what is installed -----------------------------------------------------------------------------


def versions(case: Case) -> list[Finding]:
    """Python and each package: its version, or how to install it."""
    python = Finding("python", OK, platform.python_version(), same=platform.python_version())
    return [python, *(_package(name, _needed(name, case)) for name in INSTALL)]


def _needed(name: str, case: Case) -> bool:
    """Whether the command cannot do without the package."""
    if name in ("torch", "torchvision"):
        return True
    if name == "triton":
        return case.device.type == "cuda"
    if case.recipe is None:
        return False
    pipeline = case.recipe.data.pipeline
    asked = {
        "nvidia-dali": pipeline == "dali",
        "ffcv": pipeline == "ffcv",
        "accelerate": bool(case.recipe.outputs.track),
        "deepspeed": case.recipe.parallel.startswith("deepspeed"),
    }
    return asked[name]


def _package(name: str, needed: bool) -> Finding:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            found = version(distribution)
            break
        except PackageNotFoundError:
            continue
    else:
        text = f"not installed: {INSTALL[name]}"
        if not needed:
            return Finding(name, OK, text, same="none", unequal=WARN)
        return Finding(name, FAIL, "not installed", INSTALL[name])
    if needed and name in ("torchvision", "triton"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # one built for another torch
            text = f"{found} does not import: {' '.join(str(error).split())[:200]}"
            return Finding(name, FAIL, text, INSTALL[name])
    return Finding(name, OK, found, same=found, unequal=FAIL if needed else WARN)


# -- settings and GPUs -----------------------------------------------------------------------------


def settings(case: Case) -> list[Finding]:
    """Whether the recipe's values can be trained with on so many ranks and this device."""
    if case.recipe is None:
        return []
    world = environment.place()[2]
    try:
        recipes.check(case.recipe, world)
        precision = choose_precision(case.recipe.precision, choose_device(case.recipe.device))
    except ValueError as error:
        return [Finding("settings", FAIL, str(error), "correct the setting")]
    text = f"{case.device.type}, {precision.name} ({precision.reason}), {world} rank(s)"
    return [Finding("settings", OK, text)]


def gpus(case: Case) -> list[Finding]:
    """What GPUs there are, and whether driver and PyTorch go together."""
    driver, built = _driver(), torch.version.cuda
    if not torch.cuda.is_available():
        if driver:
            text = f"driver {driver}, but PyTorch (CUDA {built or 'none'}) cannot use the GPU"
            remedy = "update the driver, or install a torch built for its CUDA version"
            return [Finding("GPUs", FAIL, text, remedy, same=text)]
        return [Finding("GPUs", OK, "none: training runs on the CPU", same="none")]
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    text = ", ".join(f"{p.name} {p.total_memory / 1e9:.0f} GB" for p in names)
    text = f"{count}: {text}; driver {driver or 'unknown'}, CUDA {built}"
    if case.device.type == "cuda" and case.ranks_here > count:
        text = f"{text}; {case.ranks_here} ranks for {count}"
        return [Finding("GPUs", FAIL, text, f"--nproc_per_node={count}")]
    ones = torch.ones(512, 512, device=torch.device("cuda", environment.place()[1] % count))
    if (ones @ ones)[0, 0].item() != 512:
        return [Finding("GPUs", FAIL, f"{text}; a product comes out wrong", "have it replaced")]
    return [Finding("GPUs", OK, text, same=text, unequal=WARN)]


def _driver() -> str:
    """Version of NVIDIA's driver, "" without one."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split("\n")[0].split() if path.exists() else []
    return next((w for w in words if w[:1].isdigit() and "." in w), "")


# -- disks -----------------------------------------------------------------------------------------


def runs_disk(case: Case) -> list[Finding]:
    """Speed of the folder of runs."""
    return _disk("runs folder", case.runs, "--runs")


def cache_disk(case: Case) -> list[Finding]:
    """Speed of the folder of packed caches."""
    return _disk("cache folder", case.data.cache_folder(), "--data.cache")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


def _disk(check: str, folder: Path, flag: str) -> list[Finding]:
    """Write, sync and read a file without a name there; one rank of a host does."""
    if environment.place()[1]:
        return []
    there = nearest(folder)
    try:
        write, read = _speeds(there)
    except OSError as error:
        text = f"cannot write {there}: {error.strerror or error}"
        return [Finding(check, FAIL, text, f"{flag} names another folder")]
    text = f"{folder}: write {write / 1e6:,.0f} MB/s with fsync, read {read / 1e6:,.0f} MB/s"
    if write < SLOW_WRITE or read < SLOW_READ:
        return [Finding(check, WARN, text, f"{flag} names a folder on a faster disk")]
    return [Finding(check, OK, text)]


def _speeds(folder: Path) -> tuple[float, float]:
    """Bytes per second (written and synced, read back). Raises OSError."""
    block = os.urandom(PROBE // 16)  # a disk may compress what repeats
    with tempfile.TemporaryFile(dir=folder, prefix=".doctor-", buffering=0) as file:
        began, size = time.perf_counter(), 0
        while size < PROBE and time.perf_counter() - began < 5:
            size += file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        return size / written, size / (time.perf_counter() - began)


# -- dataset ---------------------------------------------------------------------------------------


def dataset(case: Case, images: int = 16) -> list[Finding]:
    """Whether the recipe's dataset is there, and some images spread over it can be decoded."""
    if case.recipe is None:
        return []
    data = replace(case.data, download=False)
    try:
        found = find(data)
        step = max(len(found) // images, 1)
        rows = range(0, len(found), step)
        for row in rows:
            found.decode(row)
    except DatasetMissing as error:
        if case.data.download and data.name in DOWNLOADS:
            return [Finding("dataset", WARN, "not here yet: training fetches it (--data.download)")]
        why, _, remedies = str(error).partition("\nremedies:\n")
        return [Finding("dataset", FAIL, why, "\n".join(x.strip() for x in remedies.split("\n")))]
    except BadImage as error:
        status = WARN if data.on_error == "skip" else FAIL
        return [Finding("dataset", status, str(error), "--data.on-error skip leaves them out")]
    except ValueError as error:
        return [Finding("dataset", FAIL, str(error), "correct the setting")]
    note = f" ({found.note})" if found.note else ""
    text = f"{found.name}, {len(found):,} images{note}; {len(rows)} of them decoded"
    return [Finding("dataset", OK, text, same=found.identity())]


# -- compiler and launcher -------------------------------------------------------------------------


def compiler(case: Case) -> list[Finding]:
    """Whether torch.compile finds its C++ compiler and the Python headers, and they work."""
    setting = case.recipe.compile if case.recipe else "auto"
    trouble = missing_toolchain() or _broken_toolchain()
    if not trouble:
        return [Finding("compiler", OK, "C++ compiler and Python headers")]
    remedy = "apt-get install g++ python3-dev, or --compile off"
    if setting == "off":
        return [Finding("compiler", OK, f"{trouble}; not needed with --compile off")]
    status = FAIL if setting == "required" or case.device.type == "cuda" else WARN
    return [Finding("compiler", status, f"{trouble}: what is trained would run eager", remedy)]


def _broken_toolchain() -> str:
    """What the compiler says of a file that includes Python.h, "" if all is well."""
    program = shutil.which("g++") or shutil.which("clang++")
    command = [program, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-"]
    done = subprocess.run(
        command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=30
    )
    return "" if done.returncode == 0 else f"{program}: {done.stderr.strip().splitlines()[0]}"


def compile_cache(_case: Case) -> list[Finding]:
    """Whether compiled code can be kept, and how much there is."""
    folder = keep_compiled()
    remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder on a local disk"
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        return [Finding("compile cache", FAIL, f"cannot write {folder}: {why}", remedy)]
    size = _size(folder) if folder.is_dir() else 0
    text = f"{folder}: {size / 1e6:,.0f} MB"
    if size > LARGE_CACHE:
        return [Finding("compile cache", WARN, text, "remove it: it is made anew")]
    return [Finding("compile cache", OK, text)]


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(
        os.lstat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(folder)
        for name in names
    )


def launcher(_case: Case) -> list[Finding]:
    """What the launcher was told that will not do what is meant, as restarts of torchrun."""
    found = []
    for doubt in environment.doubts():
        text, _, remedy = doubt.partition("; ")
        found.append(Finding("launcher", WARN, text, remedy))
    return found or [Finding("launcher", OK, "{2} rank(s)".format(*environment.place()))]
