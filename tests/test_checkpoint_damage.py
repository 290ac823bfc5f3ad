"""Checkpoints on disk: which is used when some are damaged, and which are kept when pruning?"""

import shutil
from pathlib import Path

import pytest

from engine import checkpoint
from engine.checkpoint import CheckpointError, newest_whole, prune, restore, save
from engine.stored import Loaded
from tests.checkpoints import FACTS, names, started

DAMAGES = {
    "flipped byte": "shared.safetensors: wrong SHA-256",
    "truncated part": "shared.safetensors: wrong SHA-256",
    "empty part": "shared.safetensors: wrong SHA-256",
    "missing part": "rank-00000.safetensors is missing",
    "unreadable part": "shared.safetensors",
    "missing index": "checkpoint.json is missing",
    "truncated index": "checkpoint.json: ",
    "zeroed index": "checkpoint.json: ",
    "index of another kind": "checkpoint.json: ",
    "edited index": "checkpoint.json: wrong SHA-256",
    "empty folder": "checkpoint.json is missing",
}


def harm(path: Path, damage: str) -> None:
    shared, index = path / "shared.safetensors", path / "checkpoint.json"
    data = bytearray(shared.read_bytes())
    if damage == "flipped byte":
        data[len(data) // 2] ^= 1
        shared.write_bytes(data)
    elif damage == "edited index":
        index.write_text(index.read_text().replace('"salt": 0', '"salt": 2'))
    elif damage == "truncated part":
        shared.write_bytes(data[:-100])
    elif damage == "empty part":
        shared.write_bytes(b"")
    elif damage == "missing part":
        (path / "rank-00000.safetensors").unlink()
    elif damage == "unreadable part":  # as an I/O error is: an OSError that is not "not found"
        shared.unlink()
        shared.mkdir()
    elif damage == "missing index":
        index.unlink()
    elif damage == "truncated index":
        index.write_text(index.read_text()[:50])
    elif damage == "zeroed index":
        index.write_bytes(b"\0" * 500)
    elif damage == "index of another kind":
        index.write_text("[]")
    elif damage == "empty folder":
        shutil.rmtree(path)
        path.mkdir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, three, folder):
    harm(three[2], damage)
    said: list[str] = []
    assert newest_whole(folder, said.append) == three[1]
    assert len(said) == 1 and str(three[2]) in said[0] and "using the one before it" in said[0]
    assert DAMAGES[damage] in said[0]
    assert names(folder) == [p.name for p in three]
    restore(started(), Loaded(three[1]))


def test_damaged_checkpoints_are_set_aside_only_when_asked(three, folder):
    harm(three[2], "truncated part")
    harm(three[1], "missing index")
    said: list[str] = []
    assert newest_whole(folder, said.append, set_aside=True) == three[0]
    assert len(said) == 2
    assert names(folder) == ["000000008", "000000016.damaged", "000000024.damaged"]
    assert checkpoint.listing(folder) == [three[0]]
    prune(folder, 1)
    assert "000000024.damaged" in names(folder)


def test_a_second_damaged_checkpoint_of_the_same_place_gets_a_name_of_its_own(
    three, folder, trained
):
    for _ in range(2):
        harm(three[2], "missing index")
        newest_whole(folder, lambda text: None, set_aside=True)
        trained.clock.seek(24)
        save(trained, folder, FACTS)
    trained.clock.seek(16)
    aside = [n for n in names(folder) if "damaged" in n]
    assert aside == ["000000024.damaged", "000000024.damaged.2"]


def test_where_all_are_damaged_there_is_none(three, folder):
    for path in three:
        harm(path, "flipped byte")
    said: list[str] = []
    assert newest_whole(folder, said.append) is None
    assert len(said) == 3


def test_of_a_run_without_checkpoints_there_is_none(tmp_path):
    assert newest_whole(tmp_path / "nowhere", pytest.fail) is None
    assert newest_whole(tmp_path, pytest.fail) is None


def test_a_part_that_is_no_safetensors_file_is_refused(three):
    (three[2] / "shared.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="000000024"):
        Loaded(three[2])


# pruning


def test_pruning_keeps_the_newest_and_those_kept_for_good(folder, trained):
    for images in (8, 16, 24, 32, 40):
        trained.clock.seek(images)
        save(trained, folder, FACTS, keep_for_good=images == 16)
    trained.clock.seek(16)
    prune(folder, 2)
    assert names(folder) == ["000000016", "000000032", "000000040"]
    prune(folder, 2)
    assert names(folder) == ["000000016", "000000032", "000000040"]


def test_pruning_cleans_what_a_killed_save_left_and_nothing_takes_it_for_a_checkpoint(
    three, folder
):
    left = folder / ".writing-000000032"
    shutil.copytree(three[2], left)
    assert newest_whole(folder, pytest.fail) == three[2]
    prune(folder, 3)
    assert names(folder) == [p.name for p in three]


@pytest.mark.parametrize("damage", ["truncated index", "missing index", "index of another kind"])
def test_pruning_copes_with_a_damaged_old_checkpoint(damage, three, folder):
    harm(three[0], damage)
    prune(folder, 2)
    assert newest_whole(folder, pytest.fail) == three[2]
    assert three[1].name in names(folder)
