"""The watchdog: whom does it name, when, and what does it cost an iteration?"""

import time
from dataclasses import replace

import pytest
import torch

from engine import watchdog
from engine.recipe import check, load, may_change
from engine.run import RunError
from engine.watchdog import DATA, OUTPUTS, RECORD, Sign, Watchdog, accuse, read_signs, write_sign
from engine.world import Ranks
from pipelines.batch import Clock

CPU = torch.device("cpu")
HERE = Sign(
    life="1",
    rank=0,
    host="node1",
    pid=4711,
    beat=7,
    images=32,
    moves=2,
    iteration=5,
    doing="discriminator",
    still_s=700.0,
    patience_s=600.0,
    at="graph.py:1",
    waits=True,
)


def readings(*changes: dict) -> tuple[dict[int, Sign], dict[int, Sign]]:
    """Two readings of as many ranks, each like HERE but for its changes; `silent` ranks have no
    newer beat in the second."""
    before, now = {}, {}
    for rank, change in enumerate(changes):
        change = dict(change)
        silent = change.pop("silent", False)
        sign = replace(HERE, rank=rank, pid=4711 + rank, **change)
        before[rank], now[rank] = sign, sign if silent else replace(sign, beat=8)
    return before, now


def test_a_rank_without_a_sign_of_life_is_named_with_host_process_update_and_iteration():
    text = accuse(*readings({}, {"silent": True, "host": "node2"}, {}), 3, 650.0)
    assert text.startswith("rank 1 on node2, pid 4712, hangs in the update of the discriminator")
    assert "iteration 5, no sign of life, for 650 s" in text


def test_of_silent_ranks_the_one_that_is_furthest_behind_is_named_and_the_others_listed():
    text = accuse(*readings({}, {"silent": True}, {"silent": True, "moves": 1}, {}), 4, 650.0)
    assert text.startswith("rank 2 on node1")
    assert "so does rank 1;" in text


def test_a_rank_that_lives_but_is_behind_is_named_with_its_line_of_code():
    late = {"moves": 1, "doing": DATA, "at": "folder.py:80"}
    text = accuse(*readings({}, late), 2, 650.0)
    assert text.startswith("rank 1 on node1, pid 4712, hangs waiting for data, iteration 5")
    assert "(folder.py:80), for 700 s; rank 0 waits in the update of the discriminator" in text


def test_in_the_same_update_the_one_that_does_not_wait_for_the_others_is_named():
    text = accuse(*readings({}, {"waits": False, "at": "dcgan.py:30"}, {}), 3, 650.0)
    assert text.startswith("rank 1 on node1") and "dcgan.py:30" in text


def test_where_no_rank_is_behind_that_is_what_it_says():
    text = accuse(*readings({}, {}), 2, 650.0)
    assert (
        text == "no rank moves: all are in the update of the discriminator, iteration 5, for 700 s"
    )


def test_a_rank_that_gave_no_sign_is_named_by_its_number():
    before, now = readings({}, {}, {})
    del now[1], now[2]
    assert accuse(before, now, 3, 650.0).startswith("rank 1, 2 gave no sign")


@pytest.mark.parametrize("silent", [False, True])
def test_a_rank_may_take_its_own_time_for_what_is_lengthy(silent):
    """The others, that wait for it in their next update, do not lose patience first."""
    busy = {"doing": OUTPUTS, "moves": 1, "patience_s": 1500.0, "silent": silent}
    assert accuse(*readings({}, busy), 2, 650.0) is None
    late = busy | {"still_s": 1501.0}
    assert "measuring or sampling" in accuse(*readings({}, late), 2, 1501.0)


def test_signs_of_another_life_and_torn_ones_are_not_read(tmp_path):
    for rank, life in enumerate("121"):
        write_sign(tmp_path, replace(HERE, rank=rank, life=life))
    assert set(read_signs(tmp_path, "1", 4)) == {0, 2}
    (tmp_path / "00002").write_text('{"life": "1", "ra')
    assert set(read_signs(tmp_path, "1", 4)) == {0}


def test_a_shorter_sign_leaves_nothing_of_the_longer_one_before_it(tmp_path):
    write_sign(tmp_path, replace(HERE, at="x" * 300))
    write_sign(tmp_path, HERE)
    assert (tmp_path / "00000").stat().st_size == RECORD
    assert read_signs(tmp_path, "1", 1) == {0: HERE}


@pytest.fixture
def watching(tmp_path) -> Watchdog:
    """A watchdog over one rank in its second iteration, that was not started."""
    watch = Watchdog(tmp_path, Ranks(0, 0, 1, CPU), Clock(8, CPU), hang_after=100.0)
    watch.clock.advance()
    watch.clock.enter("generator")
    return watch


def looks(watch: Watchdog, *seconds: float) -> list[str | None]:
    """What it says when it looks so long after it was made."""
    made = watch._since
    return [watch._look(made + s) for s in seconds]


def test_who_moves_is_left_alone(watching):
    for s in range(0, 1000, 20):
        watching.clock.enter(DATA)
        assert looks(watching, s) == [None]


def test_who_stands_still_is_named_once_the_time_is_over(watching):
    *early, late = looks(watching, 0, 20, 40, 60, 80, 99, 101)
    assert early == [None] * 6
    assert "in the update of the generator, iteration 2, for 101 s" in late


def test_the_first_iteration_may_take_longer(tmp_path):
    watch = Watchdog(tmp_path, Ranks(0, 0, 1, CPU), Clock(8, CPU), hang_after=100.0)
    watch.clock.enter("generator")
    assert not any(looks(watch, *range(0, int(watchdog.PATIENCE_S), 20)))
    assert looks(watch, watchdog.PATIENCE_S + 1)[0]


def test_a_process_that_was_stopped_and_goes_on_accuses_nobody(watching):
    looks(watching, 0, 20)
    assert looks(watching, 1000, 1020, 1040) == [None] * 3


def test_where_another_rank_has_given_its_verdict_that_one_stands(watching):
    watching.ranks = Ranks(0, 0, 2, CPU)
    theirs = replace(HERE, rank=1, life=watching.life)
    write_sign(watching.folder, theirs)
    assert not any(looks(watching, 0, 20, 40, 60, 80))
    write_sign(watching.folder, replace(theirs, verdict="rank 0 hangs"))
    assert looks(watching, 101) == ["rank 0 hangs"]


def test_the_folder_is_gone_after_the_last_rank(tmp_path):
    ranks = [Ranks(r, r, 1, CPU) for r in (0, 1)]  # a world of one each, that shares nothing
    first, last = (Watchdog(tmp_path, r, Clock(8, CPU), 100.0).start() for r in ranks)
    first.close()
    assert [p.name for p in (tmp_path / "ranks").iterdir()] == ["00001"]
    last.close()
    assert not (tmp_path / "ranks").exists()


def test_a_folder_that_a_rank_cannot_write_to_is_refused_with_its_number(tmp_path):
    with pytest.raises(RunError, match="all ranks share; rank 3 on"):
        Watchdog(tmp_path / "elsewhere" / "run", Ranks(3, 3, 1, CPU), Clock(8, CPU), 100.0)


def test_the_setting_may_change_and_must_not_be_negative():
    assert may_change("hang_after")
    with pytest.raises(ValueError, match="--hang-after"):
        check(replace(load("dcgan_digits"), hang_after=-1.0), 1)


def test_a_mark_costs_a_step_nothing_that_can_be_measured():
    """Two attributes are set: 0.1 to 0.3 us; the bound leaves room for a busy machine."""
    clock, best = Clock(8, CPU), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            clock.enter("generator")
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 1e-5, f"{best * 1e6:.2f} us"
