"""What was compiled, as one file that other machines of this kind take: `--compile-artifact`.

A zip of PyTorch's own cache artifacts, which have a CPU's loops as source alone, and of the
libraries that were built from that, for machines of the same instructions and versions.
"""

import os
import platform
import re
import zipfile
from pathlib import Path

import torch

GRAPHS, MACHINE, THREADS, BUILT = "graphs", "machine", "threads", "built/"


class ArtifactError(ValueError):
    """A file that holds nothing to be taken; the text says why."""


def save_artifact(path: Path) -> int:
    """Write all that this process compiled, or took from the cache; the file's size in bytes, 0
    where there was nothing to write. Raises OSError."""
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(GRAPHS, found[0])
            file.writestr(MACHINE, _machine())
            file.writestr(THREADS, str(torch.get_num_threads()))
            for library in _built(_cache()):
                file.write(library, BUILT + str(library.relative_to(_cache())))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def load_artifact(path: Path, device: torch.device) -> None:
    """Put what `save_artifact` wrote into this machine's cache, for training on this device. It is
    code, and runs: load only what you trust. Raises OSError, or ArtifactError."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise zipfile.BadZipFile
            threads, here = int(file.read(THREADS)), torch.get_num_threads()
            if device.type == "cpu" and threads != here:
                raise ArtifactError(
                    f"has loops for {threads} threads in a process, which has {here} here: make it "
                    f"with OMP_NUM_THREADS={here}, or train with {threads}"
                )
            if file.read(MACHINE).decode() == _machine():
                for name in file.namelist():
                    if name.startswith(BUILT) and ".." not in name:
                        _put(_cache() / name.removeprefix(BUILT), file.read(name))
            taken = torch.compiler.load_cache_artifacts(file.read(GRAPHS))
    except (zipfile.BadZipFile, KeyError, EOFError):
        raise ArtifactError("is damaged, or no such artifact") from None
    if taken is None:
        raise ArtifactError("holds nothing for this version of PyTorch")


def _cache() -> Path:
    """The folder of compiled code (`engine.compile.keep_compiled`)."""
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).absolute()


def _machine() -> str:
    """What a library is built for: processor's instructions, Python, PyTorch."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = re.findall(r"(?m)^(?:flags|Features)\s*:.*$", told)[:1]
    return "\n".join([platform.machine(), *lines, platform.python_version(), torch.__version__])


def _built(folder: Path) -> list[Path]:
    """The libraries in a folder that this process has loaded (none where Linux does not tell), and
    the trials of which vector instructions there are, which others load."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text() if maps.exists() else ""
    names = set(re.findall(rf"(?m)\s({re.escape(str(folder))}/.*\.so)$", lines))
    trials = (path for path in folder.glob("*/*.so") if not path.name.endswith(".main.so"))
    return sorted({*map(Path, names), *trials})


def _put(path: Path, content: bytes) -> None:
    """Write a library that is not there yet, whole: another process may look for it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.chmod(0o755)
    part.replace(path)
