"""Results of benches: told beside a baseline, accepted slim, compared with those of before."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import accept, compare
from bench.accepted import accepted, read
from bench.brief import long, params, taken
from bench.side_by_side import Beside, Turns, interquartile, note, take_turns

HERE = {"device": "CPU Fast(R) Processor, 2 threads", "bf16": "CPU with AMX", "torch": "2.15.0"}
HERE |= {"python": "3.11.7", "commit": "0123456789ab"}
ROWS = {"bench_a[x]": ("fast", 2.0), "bench_b": ("fast", 4.0)}


def results(
    path: Path, rows: dict[str, tuple[str, float]], when: str = "2026-11-22", **changes
) -> Path:
    """A file as pytest-benchmark writes it: variants and their ratios by row."""
    spread, baseline = changes.pop("spread", 0.0), changes.pop("baseline", "plain")
    benchmarks = [
        {
            "name": name,
            "fullname": f"bench/bench_z.py::{name}",
            "param": None,
            "extra_info": {
                "compared": [
                    Beside(baseline, variant, "images/s", 100 * ratio, ratio, spread).__dict__
                ]
            },
            "stats": {"data": [1.0]},
        }
        for name, (variant, ratio) in rows.items()
    ]
    machine = {"node": "secret", "cpu": {"flags": ["avx2"]}, "saddle": HERE | changes}
    content = {"machine_info": machine, "benchmarks": benchmarks, "datetime": f"{when}T07:00:00"}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Accepted results, of one run."""
    there = tmp_path / "bench" / "results"
    there.mkdir(parents=True)
    accept.accept(results(tmp_path / "first.json", ROWS), there)
    return there


def compared(folder: Path, rows: dict, **changes) -> compare.Comparison:
    new = results(folder.parent / "new.json", rows, "2026-11-30", **changes)
    return compare.compare(read(new), accepted(folder))


def test_a_loss_beyond_a_tenth_is_named(folder, capsys):
    rows = ROWS | {"bench_a[x]": ("fast", 1.7)}
    found = compared(folder, rows)
    assert found.same == 1 and not found.better
    assert found.worse[0].startswith("bench_a[x] fast: 1.70x plain, 2.00x in 2026-11-22_cpu-fast")
    new = results(folder.parent / "new.json", rows)
    assert compare.main([str(new)], folder) == 1
    shown = capsys.readouterr()
    assert "slower than what was accepted: bench_a[x] fast" in shown.err
    assert "worse: bench_a[x] fast" in shown.out


def test_what_may_be_noise_is_none(folder):
    assert compared(folder, ROWS | {"bench_a[x]": ("fast", 1.81)}).same == 2
    assert compared(folder, ROWS | {"bench_a[x]": ("fast", 1.5)}, spread=0.6).same == 2
    assert compared(folder, ROWS | {"bench_a[x]": ("fast", 1.5)}, spread=None).worse
    assert compared(folder, ROWS | {"bench_a[x]": ("fast", math.nan)}).worse
    assert compared(folder, ROWS | {"bench_a[x]": ("fast", 2.5)}).better


def test_what_cannot_be_compared_is_said_and_fails_nothing(folder, capsys):
    found = compared(folder, {"bench_c": ("fast", 0.1)})
    assert found.apart == [
        "bench_c fast: no accepted result has this row",
        "bench_a[x] fast: not measured now",
        "bench_b fast: not measured now",
    ]
    assert "its baseline was plain, now other" in compared(folder, ROWS, baseline="other").apart[0]
    for other in ({"device": "H200"}, {"bf16": "CPU without bf16 instructions"}):
        found = compared(folder, {"bench_b": ("fast", 0.1)}, **other)
        assert not found.worse and "no accepted result with ratios" in found.apart[0]
    assert compare.main([str(folder.parent / "new.json")], folder) == 0
    assert "not compared: all of it" in capsys.readouterr().out


def test_a_baseline_is_not_compared_with_itself(folder):
    rows = {"bench_b": ("plain", 1.0)}
    accept.accept(results(folder.parent / "b.json", rows, "2026-11-23"), folder)
    assert compared(folder, rows).same == 0


def test_the_newest_result_of_each_row_counts(folder):
    partial = {"bench_a[x]": ("fast", 1.0)}
    accept.accept(results(folder.parent / "b.json", partial, "2026-11-25"), folder)
    accept.accept(results(folder.parent / "c.json", ROWS, "2026-11-26", device="H200"), folder)
    found = compared(folder, {"bench_a[x]": ("fast", 1.0), "bench_b": ("fast", 4.0)})
    assert found.same == 2 and not found.apart


def test_accepted_results_are_slim_and_never_replace_others(folder):
    (kept,) = folder.glob("*.json")
    assert kept.name == "2026-11-22_cpu-fast-2-threads.json"
    content = json.loads(kept.read_text())
    assert content["machine_info"] == {"saddle": HERE}
    assert set(content["benchmarks"][0]) == {"name", "param", "extra_info"}
    assert "secret" not in kept.read_text()
    assert read(kept).figures["bench_b", "fast"].ratio == 4
    other = accept.accept(results(folder.parent / "b.json", ROWS), folder)
    assert other.name == "2026-11-22_cpu-fast-2-threads-2.json"


def test_the_page_has_every_figure_and_its_source(folder, capsys):
    new = results(folder.parent / "b.json", {"bench_a[x]": ("fast", 3.0)}, "2026-11-25")
    assert accept.main([str(new)], folder) == 0
    page = (folder.parent / "RESULTS.md").read_text()
    assert "## CPU Fast(R) Processor, 2 threads, CPU with AMX" in page
    assert "| `bench_a[x]` | fast | 300 images/s | plain | 3.00 | 0.00 | 2026-11-25_cpu" in page
    assert "| `bench_b` | fast | 400 images/s | plain | 4.00 | 0.00 | 2026-11-22_cpu" in page
    assert "2026-11-25_cpu-fast-2-threads.json`: commit 0123456789ab, torch 2.15.0" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"commit": "0123456789ab+"}, "commit the changes"), ({"rows": {}}, "nothing to accept")],
)
def test_what_nobody_can_check_is_not_accepted(folder, capsys, changes, said):
    changes = dict(changes)
    new = results(folder.parent / "b.json", changes.pop("rows", ROWS), **changes)
    assert accept.main([str(new)], folder) == 2
    assert said in capsys.readouterr().err
    assert len(list(folder.glob("*.json"))) == 1


def test_a_file_without_results_is_one_clear_error(tmp_path, capsys):
    for text in ("", "{}", '{"machine_info": {}}'):
        (tmp_path / "x.json").write_text(text)
        assert compare.main([str(tmp_path / "x.json")], tmp_path) == 2
        assert "holds no results of benches" in capsys.readouterr().err


def test_the_page_in_the_repository_is_of_its_results():
    place = Path(accept.__file__).parent
    assert (place / "RESULTS.md").read_text() == accept.page(accepted())


def test_variants_take_turns_and_warm_up_is_left_out():
    called, seconds = [], {"plain": [9.0, 2.0, 4.0, 2.0], "fast": [9.0, 1.0, 1.0, 2.0]}
    variants = {name: lambda name=name: called.append(name) for name in seconds}

    def clock(run):
        run()
        return seconds[called[-1]][len(called) // 2 - (len(called) % 2 == 0)]

    turns = take_turns("plain", variants, 3, clock)
    assert called == ["plain", "fast"] * 4
    assert turns.ratios("fast") == [2.0, 4.0, 1.0] and turns.ratio("fast") == 2.0
    row = SimpleNamespace(extra_info={})
    note(row, turns.beside("fast", 7.0, "images/s"))
    told = {"baseline": "plain", "variant": "fast", "unit": "images/s", "value": 7.0}
    assert row.extra_info["compared"] == [told | {"ratio": 2.0, "spread": 1.5, "floor": 0.1}]


def test_a_single_round_has_no_spread():
    assert interquartile([1.0]) is None
    assert Turns("plain", {"plain": [2.0], "fast": [1.0]}).beside("fast", 1.0, "s").spread is None


def test_rows_beyond_the_brief_run_are_marked():
    assert [list(param.marks) for param in params(["a", "b"], ["a"])] == [[], [long]]
    assert taken(["a", "b"], ["a"], False) == ["a"] and taken(["a", "b"], ["a"], True) == ["a", "b"]
