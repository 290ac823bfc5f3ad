"""The doctor: each of its verdicts is provoked, and its command line."""

import json
import sys
import time
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from engine import footprint
from engine import recipe as recipes
from launch import checks, doctor, needs
from launch.findings import FAIL, OK, WARN, Case, Check, Finding, attempt, merge
from tests.images import images

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(checks, "PROBE", 2**20)
    monkeypatch.setattr(checks, "SLOW_WRITE", 0.0)  # of a busy machine that tests
    monkeypatch.setattr(checks, "SLOW_READ", 0.0)
    monkeypatch.setenv("COLUMNS", "200")


def case(*flags: str, name: str = "dcgan_digits") -> Case:
    """The case of a command line."""
    return doctor.read([name, *flags])[0]


def only(find, case: Case) -> Finding:
    """The one finding of a check."""
    (finding,) = attempt(Check("it", find), case)
    return finding


# -- the command line ------------------------------------------------------------------------------


def test_without_a_recipe_the_machine_is_examined(capsys):
    assert doctor.main([]) in (0, 1)
    shown = capsys.readouterr().out
    assert "torch" in shown and "cache folder" in shown and "dataset" not in shown


def test_what_fails_is_named_with_its_remedy_and_hides_nothing(tmp_path, capsys):
    file = tmp_path / "found.json"
    flags = ["--data.root", str(tmp_path), "--device", "cpu", "--json", str(file)]
    assert doctor.main(["gan_mnist", *flags]) == 1
    found = {f["check"]: f for f in json.loads(file.read_text())["findings"]}
    assert found["dataset"]["status"] == FAIL and "SADDLE_DATA" in found["dataset"]["remedy"]
    assert found["disk for runs"]["status"] == found["host memory"]["status"] == OK
    assert "compile cache" in found
    assert "1 fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dcgan_digit"], "did you mean dcgan_digits"),
        (["--seed", "1"], "must follow a recipe"),
        (["dcgan_digits", "--json"], "--json needs"),
        (["dcgan_digits", "--epochs", "1", "--steps", "1"], "not both"),
        (["dcgan_digits", "--no-such-flag"], "no-such-flag"),
    ],
)
def test_a_wrong_command_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as done:
        doctor.main(arguments)
    assert done.value.code == 2
    assert said in "".join(capsys.readouterr())


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    assert doctor.main(["dcgan_digits", f"--json={tmp_path}/no/such/file"]) == 2
    assert "no/such/file cannot be written" in capsys.readouterr().err


def test_help_is_the_docstring(capsys):
    assert doctor.main(["--help"]) == 0
    assert "starts no training" in " ".join(capsys.readouterr().out.split())


# -- each check alone ------------------------------------------------------------------------------


def test_a_check_that_hangs_or_breaks_is_one_failure():
    def hang(case):
        time.sleep(30)

    def break_down(case):
        raise OSError("the disk is gone")

    began = time.monotonic()
    (slow,) = attempt(Check("slow", hang, 0.2, "look at the disk"), Case(None, CPU))
    assert time.monotonic() - began < 5
    assert (slow.status, slow.remedy) == (FAIL, "look at the disk") and "0.2 s" in slow.text
    broken = only(break_down, Case(None, CPU))
    assert broken.status == FAIL and "the disk is gone" in broken.text


def test_a_package_is_installed_or_how_to_install_it_is_said(monkeypatch):
    known = checks.version

    def version(name):
        if name == "ffcv":
            raise checks.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(checks, "version", version)
    found = {f.check: f for f in checks.versions(case())}
    assert found["torch"].text == known("torch") and found["torch"].status == OK
    assert found["ffcv"].status == OK and "pip install 'saddle[ffcv]'" in found["ffcv"].text
    found = {f.check: f for f in checks.versions(case("--data.pipeline", "ffcv"))}
    assert found["ffcv"].status == FAIL and "saddle[ffcv]" in found["ffcv"].remedy


def test_a_torchvision_of_another_torch_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it now raises ImportError
    found = {f.check: f for f in checks.versions(Case(None, CPU))}
    assert found["torchvision"].status == FAIL and "does not import" in found["torchvision"].text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.batch", "0"], "at least 1"),
        (["--device", "cpu", "--precision", "fp16"], "for GPUs only"),
        (["--data.batch", "64", "--accumulate", "3"], "does not divide"),
    ],
)
def test_settings_that_contradict_fail(flags, said):
    finding = only(checks.settings, case(*flags))
    assert finding.status == FAIL and said in finding.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_fails(monkeypatch):
    finding = only(checks.settings, case("--device", "cuda"))
    assert finding.status == FAIL and "device=cuda" in finding.text
    assert only(checks.gpus, case()).status == OK
    monkeypatch.setattr(checks, "_driver", lambda: "535.12")
    finding = only(checks.gpus, case())
    assert finding.status == FAIL and "535.12" in finding.text and "driver" in finding.remedy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpus_are_listed_and_too_many_ranks_fail():
    gpu = Case(None, torch.device("cuda"))
    assert only(checks.gpus, gpu).status == OK
    many = replace(gpu, ranks_here=torch.cuda.device_count() + 1)
    assert only(checks.gpus, many).status == FAIL


def test_a_folder_is_measured_and_one_that_cannot_be_written_fails(tmp_path, monkeypatch):
    good = only(checks.runs_disk, case("--runs", f"{tmp_path}/not/yet"))
    assert good.status == OK and "MB/s" in good.text and not list(tmp_path.iterdir())
    monkeypatch.setattr(checks, "SLOW_WRITE", 1e15)
    slow = only(checks.runs_disk, case("--runs", str(tmp_path)))
    assert slow.status == WARN and "--runs" in slow.remedy
    (tmp_path / "file").write_text("")
    bad = only(checks.cache_disk, case("--data.cache", f"{tmp_path}/file/cache"))
    assert bad.status == FAIL and "cannot write" in bad.text and "--data.cache" in bad.remedy


def test_images_are_decoded(tmp_path):
    images(tmp_path, 20, (20, 20), 1)
    flags = ["--data.name", "folder", "--data.path", str(tmp_path)]
    assert "20 images; 20 of them decoded" in only(checks.dataset, case(*flags)).text
    next(tmp_path.rglob("*.png")).write_bytes(b"<html>404</html>")
    bad = only(checks.dataset, case(*flags))
    assert bad.status == FAIL and ".png" in bad.text and "on-error skip" in bad.remedy
    assert only(checks.dataset, case(*flags, "--data.on-error", "skip")).status == WARN


def test_a_dataset_that_will_be_fetched_is_a_warning(tmp_path):
    flags = ["--data.root", str(tmp_path), "--data.download"]
    assert only(checks.dataset, case(*flags, name="gan_mnist")).status == WARN
    assert not list(tmp_path.iterdir())


def test_a_batch_too_large_for_memory_fails():
    def finding(batch):
        return only(needs.memory, case("--device", "cpu", "--data.batch", str(batch)))

    small, huge = finding(64), finding(10**9)
    assert small.status == OK and "activations of 64 images" in small.text
    assert huge.status == FAIL and "--accumulate" in huge.remedy
    image = needs.activation_bytes(recipes.load("dcgan_digits"), 10)
    assert finding(round(0.9 * footprint.free_memory() / image)).status in (WARN, FAIL)


@pytest.mark.parametrize(("given", "images"), [("16", 16), ("auto", 1), ("64", 64)])
def test_memory_is_that_of_the_chosen_micro_batch(given, images):
    found = only(needs.memory, case("--device", "cpu", "--batch-per-rank", given))
    assert f"activations of {images} images" in found.text


def test_memory_is_that_of_all_ranks_here_and_sharding_saves_some(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    spread = case("--parallel", "fsdp2").recipe
    (_, state), *_ = needs.state_bytes(spread).items()
    assert needs._held(state, spread) == state.held - state.optimizer / 2
    assert needs._held(state, case().recipe) == state.held
    two = only(needs.memory, replace(case(), ranks_here=2))
    assert "32 images, 2 ranks here" in two.text


def test_a_container_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 300\n")
    assert footprint._cgroup_rooms(tmp_path) == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert footprint._cgroup_rooms(tmp_path) == []


def test_checkpoints_that_do_not_fit_the_disk_fail(tmp_path, monkeypatch):
    flags = ["--runs", str(tmp_path), "--data.cache", str(tmp_path)]
    runs, cache = needs.disk(case(*flags))
    assert runs.status == cache.status == OK and "4 checkpoints" in runs.text
    full = needs.disk(case(*flags, "--keep", "100000000"))[0]
    assert full.status == FAIL and "--keep" in full.remedy
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: usage(100, 0, 100))
    assert needs.disk(case(*flags))[1].status == FAIL
    kept_for_good = case("--keep-every", "10", "--kimg", "100").recipe
    assert needs.checkpoints(kept_for_good, 0) == 2 + needs.SPARE + 10


def test_a_compiler_is_found_and_works(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(checks.compiler, case("--device", "cpu")).status == WARN
    missing = only(checks.compiler, case("--compile", "required"))
    assert missing.status == FAIL and "g++" in missing.text and "apt-get" in missing.remedy
    assert only(checks.compiler, case("--compile", "off")).status == OK
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    program.chmod(0o755)
    broken = only(checks.compiler, case("--compile", "required"))
    assert broken.status == FAIL
    assert "broken compiler" in broken.text or "no Python headers" in broken.text


def test_the_compile_cache_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "graph").write_bytes(bytes(3_000_000))
    found = only(checks.compile_cache, Case(None, CPU))
    assert found.status == OK and "3 MB" in found.text
    monkeypatch.setattr(checks, "LARGE_CACHE", 1e6)
    assert only(checks.compile_cache, Case(None, CPU)).status == WARN
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/graph/cache")
    bad = only(checks.compile_cache, Case(None, CPU))
    assert bad.status == FAIL and "TORCHINDUCTOR_CACHE_DIR" in bad.remedy


# -- several ranks ---------------------------------------------------------------------------------


def test_ranks_that_deviate_are_named():
    new, old = Finding("torch", OK, "2.15", same="2.15"), Finding("torch", OK, "2.14", same="2.14")
    (one,) = merge([("rank 0 on a", [old]), ("rank 1 on b", [new]), ("rank 2 on c", [new])])
    assert one.status == FAIL and one.text == "2.15\nrank 0 on a: 2.14"
    bad = Finding("dataset", FAIL, "not found", "say where")
    good = Finding("dataset", OK, "mnist", same="digest")
    (one,) = merge([("rank 0 on a", [good]), ("rank 1 on b", [bad])])
    assert (one.status, one.remedy) == (FAIL, "say where")
    assert one.text == "mnist\nrank 1 on b: not found"
    alike = [(f"rank {r} on a", [good]) for r in range(3)]
    assert merge(alike) == [good]
    many = [("rank 9 on a", [good])] + [(f"rank {r} on b", [bad]) for r in range(6)]
    assert "not found" in merge(many)[0].text.splitlines()[0]
    here_only = merge([("rank 0 on a", [good, bad]), ("rank 1 on a", [])])
    assert [f.check for f in here_only] == ["dataset"]
