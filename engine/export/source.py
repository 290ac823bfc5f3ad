"""The source that an export carries along: a network's module and those it imports.

Only modules of `engine.networks` go along, their imports of each other made relative. Whatever else
of the project a network imports would be missing where the export is used, and is refused.
"""

import ast
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "engine.networks"
OURS = ("engine", "kernels", "pipelines")
INIT = '''"""The networks of this export: `load(folder)` gives the exported module."""

from .load import load

__all__ = ["load"]
'''


class ExportError(RuntimeError):
    """A run cannot be exported, though the command is right."""


def modules(network: dict[str, Any]) -> list[str]:
    """Full names of the modules of a network that `describe` described, and of those it holds."""
    own = f"{PACKAGE}.{network['class'].rpartition('.')[0]}"
    held = [value for value in network["sizes"].values() if isinstance(value, dict)]
    return [own, *(name for value in held for name in modules(value))]


def bundle(names: list[str]) -> dict[str, str]:
    """File name and text of all that these network modules need, themselves and `load` included.

    names: full ones, as "engine.networks.dcgan". Raises ExportError for an import that cannot go
    along.
    """
    files, left = {"__init__.py": INIT}, [*names, f"{PACKAGE}.load"]
    while left:
        name = left.pop()
        if re.fullmatch(rf"{re.escape(PACKAGE)}\.\w+", name) is None:
            raise ExportError(
                f"{name} cannot go along with an export: its network must be in a file of "
                f"engine/networks/, which imports nothing else of the project"
            )
        file = name.rpartition(".")[2] + ".py"
        if file not in files:
            text = Path(find_spec(name).origin).read_text()
            files[file] = re.sub(rf"(?m)^(\s*from ){re.escape(PACKAGE)}\.", r"\1.", text)
            left += _imports(name, text)
    return files


def digest(files: dict[str, str]) -> str:
    """SHA-256 of the files of a bundle."""
    text = "\0".join(f"{name}\0{files[name]}" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def _imports(name: str, text: str) -> list[str]:
    """The modules of the project that a module imports, in the one form that is rewritten."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [f"{alias.name} (say `from MODULE import NAME`)" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if not node.level else [f"{OURS[0]} (relative)"]
        ours = [n for n in names if n.split(".")[0].split(" ")[0] in OURS]
        for imported in ours:
            if not imported.startswith(f"{PACKAGE}.") or "(" in imported:
                raise ExportError(
                    f"{name} imports {imported}, which cannot go along with an export"
                )
        found += ours
    return found
