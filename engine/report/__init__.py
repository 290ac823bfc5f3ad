"""What does a run look like? One self-contained page, report.html, rebuilt while it trains.

`write(run_dir)` reads what the run has left so far and may be called at any moment;
`python -m engine.report RUN_DIR` does the same by hand, and with several run directories it
compares them. No torch is imported here: a page is there within a second.

    read.py        the files of a run: recipe.json, stats.jsonl, metrics.jsonl, best.json
    embed.py       picture files inside the page
    curves.py      which chart a logged value belongs to, and how many of its points are shown
    quality.py     metrics, each with its protocol
    sections.py    all else that the page of a run shows
    comparison.py  what the page of several runs shows
    page.py        one JSON object, the scripts and the style, put into one file
"""

from engine.report.page import write, write_comparison

__all__ = ["write", "write_comparison"]
