"""Writing checkpoints: is each whole or not there, after a kill, a full disk, a second save?"""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import checkpoint
from engine.checkpoint import CheckpointError, newest_whole, prune, restore, save
from engine.stored import Loaded
from tests.checkpoints import FACTS, advance, names, started


def test_saving_again_at_the_same_place_replaces_the_checkpoint(folder):
    live = advance(started(), 1)
    path = save(live, folder, FACTS)
    live.change_noise(3)
    assert save(live, folder, FACTS) == path
    assert Loaded(path).index["salt"] == 3 and names(folder) == [path.name]


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(
    folder, trained, monkeypatch
):
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(old: Path, new: Path) -> None:
        events.append(f"rename to {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(trained, folder, FACTS)
    at = events.index("rename to 000000016")
    assert set(events[:at]) == {
        *("shared.safetensors", "rank-00000.safetensors", "checkpoint.json"),
        ".writing-000000016",
    }
    assert events[at + 1 :] == ["checkpoints"]


class KilledError(BaseException):
    """The process ends here."""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(three, folder, trained):
    trained.clock.seek(32)
    wanted, moments = {three[2], folder / "000000032"}, 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            left = [moments]

            def dying(plain, left=left):
                def call(*args, **kwargs):
                    if left[0] == 0:
                        raise KilledError
                    left[0] -= 1
                    return plain(*args, **kwargs)

                return call

            for name in ("fsync", "rename", "open"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                save(trained, folder, FACTS)
                break
            except KilledError:
                moments += 1
        newest = newest_whole(folder, pytest.fail)
        assert newest in wanted
        restore(started(), Loaded(newest))
        shutil.rmtree(folder / "000000032", ignore_errors=True)
    trained.clock.seek(16)
    assert moments >= 8
    assert newest_whole(folder, pytest.fail) == folder / "000000032"
    assert not [n for n in names(folder) if n.startswith(".")]


def assert_a_full_disk_is_named_and_loses_nothing(three, folder, trained, monkeypatch) -> None:
    """Save on a disk that `monkeypatch` has filled, and look at what is left."""
    with pytest.raises(CheckpointError, match="000000032: the disk is full"):
        save(trained, folder, FACTS)
    monkeypatch.undo()
    trained.clock.seek(16)
    assert names(folder) == [p.name for p in three]
    assert newest_whole(folder, pytest.fail) == three[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(
    call, number, three, folder, trained, monkeypatch
):
    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    trained.clock.seek(32)
    monkeypatch.setattr(os, call, full)
    assert_a_full_disk_is_named_and_loses_nothing(three, folder, trained, monkeypatch)


def test_a_device_that_is_full_is_named_and_earlier_checkpoints_stay(
    three, folder, trained, monkeypatch
):
    """The kernel's own ENOSPC: every write to /dev/full gives it."""
    trained.clock.seek(32)
    monkeypatch.setattr(checkpoint, "SHARED", "/dev/full")
    assert_a_full_disk_is_named_and_loses_nothing(three, folder, trained, monkeypatch)


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 300 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_for_real_keeps_the_checkpoints_written_before(tiny_disk, trained):
    folder = tiny_disk / "checkpoints"
    try:
        written = []
        with pytest.raises(CheckpointError, match="the disk is full"):
            for images in range(8, 8000, 8):
                trained.clock.seek(images)
                written.append(save(trained, folder, FACTS))
    finally:
        trained.clock.seek(16)
    assert written and names(folder) == [p.name for p in written]
    assert newest_whole(folder, pytest.fail) == written[-1]
    restore(started(), Loaded(written[-1]))
    prune(folder, 1)
    save(trained, folder, FACTS)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, trained):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*000000016"):
        save(trained, tmp_path / "checkpoints", FACTS)
