"""A run that is stopped anywhere goes on as if it had not been: killed, asked to stop, disk full,
damaged checkpoints. Bitwise on one device, through the real command line."""

import json
import os
import shutil
import signal

import pytest

from engine import checkpoint
from tests.forked import train
from tests.images import images
from tests.runs import (
    QUICK,
    differences,
    final_state,
    kill_at,
    newest_picture,
    run_folder,
    start,
    toy,
    wait_for,
)

BATCH = 8
RUN = ("--run-name", "it")


def small(name: str) -> list[str]:
    """A toy run on computed images in the recipe's own precision."""
    return [*toy(name, BATCH)[1], *QUICK, *RUN]


def every(steps: int) -> list[str]:
    """Checkpoint after so many steps, and keep them all."""
    return ["--checkpoint-every", str(steps * BATCH / 1000), "--keep", "10000"]


@pytest.mark.parametrize(
    ("name", "compiled", "ranks"),
    [
        pytest.param("dcgan_mnist", "off", 1, marks=[pytest.mark.slow, pytest.mark.repeated]),
        pytest.param("vae_mnist", "off", 1, marks=[pytest.mark.slow, pytest.mark.repeated]),
        ("vae_mnist", "required", 1),
        ("dcgan_mnist", "off", 2),
        pytest.param("vae_mnist", "off", 2, marks=[pytest.mark.slow, pytest.mark.repeated]),
        pytest.param("dcgan_mnist", "required", 2, marks=[pytest.mark.slow, pytest.mark.repeated]),
    ],
)
def test_7_steps_kill_and_13_more_equal_20_unbroken(name, compiled, ranks, tmp_path):
    """With the average, augmentation by flips, two micro-batches, a decaying learning rate."""
    player = "autoencoder" if name.startswith("vae") else "generator"
    flags = [*small(name), "--compile", compiled, "--data.flip", "--accumulate", "2"]
    flags += ["--sync-bn", "off"]  # which would not be compiled
    flags += [f"--{player}.ema-kimg", "0.1", f"--{player}.decay-kimg", "0.1"]
    whole, broken = ["--runs", str(tmp_path / "a")], ["--runs", str(tmp_path / "b")]
    folder = tmp_path / "b" / name / "it"
    train(name, *flags, *whole, "--steps", "20", ranks=ranks)
    # The decay ends with the run: the killed one has the same end in sight.
    longer = [*flags, *broken, f"--{player}.decay-kimg", "0.1"]
    kill_at(folder, 7 * BATCH, name, *longer, *every(7), "--steps", "20", ranks=ranks)
    output = train(name, *flags, *broken, "--steps", "20", ranks=ranks)
    assert f"from {7 * BATCH} images" in output
    assert not differences(final_state(tmp_path / "a" / name / "it"), final_state(folder))
    assert newest_picture(tmp_path / "a" / name / "it") == newest_picture(folder)


@pytest.mark.parametrize(
    "pipeline",
    [
        "resident",
        pytest.param("torchvision", marks=[pytest.mark.slow, pytest.mark.repeated]),
    ],
)
def test_resume_in_mid_epoch_is_exact_with_either_pipeline(pipeline, tmp_path):
    """64 computed images would be an epoch; here the order crosses several."""
    flags = [*small("dcgan_digits"), "--data.name", "digits", "--data.pipeline", pipeline]
    flags += ["--data.flip", "--data.batch", "700"]
    for runs, parts in (("whole", (6,)), ("broken", (2, 6))):
        for steps in parts:
            train("dcgan_digits", *flags, "--steps", str(steps), "--runs", str(tmp_path / runs))
    whole, broken = (tmp_path / runs / "dcgan_digits" / "it" for runs in ("whole", "broken"))
    assert not differences(final_state(whole), final_state(broken))


def test_a_copy_of_the_dataset_is_the_same_dataset(tmp_path):
    images(tmp_path / "photos", 20, (20, 20), 1)
    flags = [*toy("dcgan_digits", BATCH)[1], *QUICK, *RUN, "--runs", str(tmp_path / "runs")]
    flags += ["--data.name", "folder", "--data.path"]
    train("dcgan_digits", *flags, str(tmp_path / "photos"), "--steps", "2")
    shutil.copytree(tmp_path / "photos", tmp_path / "copy", copy_function=shutil.copyfile)
    output = train("dcgan_digits", *flags, str(tmp_path / "copy"), "--steps", "4")
    assert f"from {2 * BATCH} images" in output
    images(tmp_path / "copy", 1, (24, 24), 2)
    output = train("dcgan_digits", *flags, str(tmp_path / "copy"), "--steps", "6", code=2)
    assert "the dataset is not the one that" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(number, tmp_path):
    flags = [*small("dcgan_digits"), "--runs", str(tmp_path), "--steps", "100000"]
    process = start("dcgan_digits", *flags)
    folder = tmp_path / "dcgan_digits" / "it"
    wait_for(folder / "stats.jsonl", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "the same command goes on" in output
    (saved,) = checkpoint.listing(folder / "checkpoints")
    assert not checkpoint.damage_of(saved)
    images = int(saved.name)
    train("dcgan_digits", *flags[:-1], str(images // BATCH + 2))
    assert int(checkpoint.listing(folder / "checkpoints")[0].name) == images + 2 * BATCH


def test_two_ranks_leave_together_when_the_launcher_is_asked_to_stop(tmp_path):
    flags = [*small("dcgan_digits"), "--runs", str(tmp_path), "--steps", "100000"]
    process = start("dcgan_digits", *flags, ranks=2)
    folder = tmp_path / "dcgan_digits" / "it"
    wait_for(folder / "samples", process)
    wait_for(folder / "stats.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert "the same command goes on" in output
    (saved,) = checkpoint.listing(folder / "checkpoints")
    assert not checkpoint.damage_of(saved)


def test_a_second_interrupt_exits_at_once(tmp_path):
    flags = [*small("dcgan_digits"), "--runs", str(tmp_path), "--steps", "100000"]
    process = start("dcgan_digits", *flags)
    wait_for(tmp_path / "dcgan_digits" / "it" / "stats.jsonl", process)
    os.kill(process.pid, signal.SIGSTOP)  # so that both arrive before the iteration's end
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (0, 130)


@pytest.fixture
def finished(tmp_path):
    """(flags, run folder) of a run with checkpoints at 2, 4 and 6 steps."""
    flags = [*small("dcgan_digits"), "--runs", str(tmp_path)]
    train("dcgan_digits", *flags, *every(2), "--steps", "6")
    return flags, run_folder(tmp_path, "dcgan_digits")


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(finished):
    flags, folder = finished
    whole = final_state(folder)
    newest, before, _ = checkpoint.listing(folder / "checkpoints")
    flipped = newest / checkpoint.SHARED
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    torn = before / checkpoint.SHARED
    torn.write_bytes(torn.read_bytes()[:1000])
    output = train("dcgan_digits", *flags, "--steps", "6", "--keep", "10")
    assert f"{newest.name} is damaged" in output
    assert f"{before.name} is damaged" in output
    assert f"from {2 * BATCH} images" in output
    assert not differences(whole, final_state(folder))
    assert (folder / "checkpoints" / f"{newest.name}.damaged").exists()


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_over_what_is_left(finished):
    flags, folder = finished
    for path in checkpoint.listing(folder / "checkpoints"):
        (path / checkpoint.SHARED).write_bytes(b"torn")
    before = (folder / "stats.jsonl").read_bytes()
    for _ in range(2):  # the first has set them aside
        output = train("dcgan_digits", *flags, "--steps", "6", code=1)
        assert "is whole: put back" in output and "--fresh" in output and "Traceback" not in output
    assert (folder / "stats.jsonl").read_bytes() == before


def test_stats_of_steps_that_are_done_again_are_replaced(finished):
    flags, folder = finished
    for part in (last := checkpoint.listing(folder / "checkpoints")[0]).iterdir():
        part.unlink()
    last.rmdir()
    train("dcgan_digits", *flags, "--steps", "6")
    entries = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    ticks = [e["images"] for e in entries if "values" in e]
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == 6 * BATCH


def test_other_settings_are_refused_with_the_difference(finished):
    flags, folder = finished
    output = train("dcgan_digits", *flags, "--generator.lr", "0.5", "--steps", "9", code=2)
    assert "--generator.lr: the run has 0.001, this command says 0.5" in output
    assert "Traceback" not in output
    assert checkpoint.listing(folder / "checkpoints")[0].name == f"{6 * BATCH:09}"


def test_a_finished_run_says_how_to_lengthen_it(finished):
    flags, _ = finished
    output = train("dcgan_digits", *flags, "--steps", "6")
    assert "is finished at 48 images" in output
    assert "--steps 12" in output


def test_fresh_starts_beside_the_old_run(finished):
    flags, folder = finished
    train("dcgan_digits", *flags, "--steps", "2", "--fresh")
    assert {p.name for p in folder.parent.iterdir()} == {"it", "it.2"}
    assert len(checkpoint.listing(folder / "checkpoints")) == 3


def test_a_run_in_use_is_refused(finished):
    flags, folder = finished
    process = start("dcgan_digits", *flags, "--steps", "100000")
    try:
        size = (folder / "stats.jsonl").stat().st_size
        while (folder / "stats.jsonl").stat().st_size <= size:
            assert process.poll() is None
        output = train("dcgan_digits", *flags, "--steps", "100000", code=1)
    finally:
        process.kill()
        process.communicate()
    assert "is being trained by another process" in output
