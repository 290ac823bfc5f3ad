"""How do data, scripts and style become one file that opens offline and loads nothing?"""

import html
import json
from pathlib import Path

from engine.report import comparison, sections
from engine.report.read import Json
from engine.whole import write_whole

HERE = Path(__file__).parent
SCRIPTS = ("elements.js", "chart.js", "pictures.js", "run.js", "comparison.js", "draw.js")


def write(run_dir: Path, out: Path | None = None) -> list[str]:
    """Rebuild run_dir/report.html, or write the page elsewhere; a reader sees the old page or the
    new one, never half. Gives the notes on what could not be read."""
    return _write(out or run_dir / "report.html", sections.payload(run_dir))


def write_comparison(run_dirs: list[Path], out: Path) -> list[str]:
    """Write one page that compares runs. Gives the notes on what could not be read."""
    return _write(out, comparison.payload(run_dirs))


def _write(out: Path, data: Json) -> list[str]:
    write_whole(out, page(data))
    return [e["text"] for e in data["events"] if e["kind"] == "note" and e["images"] is None]


def page(data: Json) -> bytes:
    """The whole page."""
    head, tail = template().split("@DATA@")
    head = head.replace("@TITLE@", html.escape(data["title"]))
    return (head + script_safe(data) + tail).encode()


def template() -> str:
    """The page without title and data."""
    text = (HERE / "page.html").read_text(encoding="utf-8")
    style = (HERE / "style.css").read_text(encoding="utf-8")
    scripts = (HERE.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    return text.replace("@STYLE@", style).replace("@SCRIPT@", "\n".join(scripts))


def script_safe(data: Json) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
