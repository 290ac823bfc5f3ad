"""Recipes on the command line: every setting, its help, what is refused, how long a run is."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine import recipe as recipes
from engine import train
from engine.settings import Length
from tests.runs import parsed

FAMILIES = ("dcgan_digits", "vae_mnist", "vae_celeba", "gan_mnist")


def other_value(flag: str, value: object) -> tuple[list[str], object]:
    """A valid value that differs from `value`: as command-line words and as a setting."""
    choices = {
        "device": "cpu",
        "precision": "fp32",
        "compile": "off",
        "graph": "on",
        "memory-format": "contiguous",
        "convolutions": "matmul",
        "probe": "off",
        "kernels": "fused",
        "on-nan": "rollback",
        "data.name": "synthetic",
        "data.pipeline": "torchvision",
        "data.on-error": "skip",
        "data.beton": "jpeg",
        "parallel": "fsdp2",
        "sync-bn": "on",
        "metrics.split": "test" if value == "train" else "train",
        "metrics.extractor": "inception",
        "metrics.network": "module:Class",
        "pixels": "gaussian" if value == "bernoulli" else "bernoulli",
    }
    if flag in choices:
        return [choices[flag]], choices[flag]
    if flag == "data.channels":
        return (["1"], 1) if value == 3 else (["3"], 3)
    if flag in ("data.root", "data.path", "data.cache", "metrics.weights"):
        return ["/some/place"], Path("/some/place")
    if flag == "data.window":
        return ["1", "2"], (1, 2)
    if flag == "data.without":
        return ["3", "4"], (3, 4)
    if flag == "augment":
        return ["color", "cutout"], ("color", "cutout")
    if flag == "loss":
        return ["hinge"], "hinge"
    if flag == "track":
        return ["wandb", "mlflow"], ("wandb", "mlflow")
    if isinstance(value, bool):
        return [], not value
    if isinstance(value, tuple):
        changed = tuple(v / 2 if isinstance(v, float) else v + 1 for v in value)
        return [str(v) for v in changed], changed
    changed = 3 if value is None else value + 1
    return [str(changed)], changed


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_can_be_overridden_and_changes_nothing_else(name):
    default = recipes.load(name)
    values, flags = recipes.flatten(default), recipes.flatten(default, flags=True)
    lengths = {f"length.{n}" for n in ("kimg", "epochs", "steps")}
    assert len(values) == len(flags) > 35
    for (path, value), flag in zip(values.items(), flags, strict=True):
        words, wanted = other_value(flag, value)
        if isinstance(value, bool):
            *group, last = flag.split(".")
            flag = ".".join([*group, f"no-{last}"]) if value else flag
        found = recipes.flatten(parsed(f"--{flag}", *words, name=name))
        assert found[path] == wanted != value, flag
        assert type(found[path]) is type(wanted) or isinstance(wanted, int), flag
        same = values.keys() - {path} - (lengths if path in lengths else set())
        assert all(found[p] == values[p] for p in same), flag


def test_the_command_has_its_own_flags():
    command = recipes.parse(
        "dcgan_digits", ["--run", "a", "--fresh", "--runs", "/tmp/r", "--dry-run"]
    )
    assert (command.run, command.fresh, command.dry_run) == ("a", True, True)
    assert command.runs == Path("/tmp/r")
    plain = recipes.parse("dcgan_digits", [])
    assert (plain.run, plain.fresh, plain.dry_run) == (None, False, False)
    assert plain.recipe == recipes.load("dcgan_digits")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dcgan_digits", "--bogus", "1"], "--bogus"),
        (["dcgan_digits", "--seed", "many"], "--seed"),
        (["dcgan_digits", "--device", "tpu"], "tpu"),
        (["dcgan_digits", "--data.channels", "2"], "--data.channels"),
        (["dcgan_digits", "--generator.betas", "0.5"], "--generator.betas"),
        (["dcgan_digit"], "did you mean dcgan_digits"),
        (["dcgan_digits", "--steps", "5", "--epochs", "2"], "--epochs and --steps"),
        (["dcgan_digits", "--data.batch", "10", "--accumulate", "4"], "data.batch=10"),
        (["dcgan_digits", "--data.name", "nope"], "data.name='nope'"),
        (["dcgan_digits", "--data.resolution", "30", "--dry-run"], "data.resolution=30"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_exit_code_2_and_no_traceback(arguments, says, capsys):
    with pytest.raises(SystemExit) as leaving:
        train.main(arguments)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize("name", FAMILIES)
def test_the_help_documents_every_setting(name):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), pytest.raises(SystemExit) as leaving:
        recipes.parse(name, ["--help"])
    assert leaving.value.code == 0
    text = re.sub(r"[\s│]+", " ", screen.getvalue())
    for flag in recipes.flatten(recipes.load(name), flags=True):
        after = re.split(rf"--{re.escape(flag)}[ ,]", text, maxsplit=1)
        assert len(after) == 2, flag
        described = after[1].split("(default:", 1)[0]
        assert re.search(r"[a-z]{4,}.*\.\s*$", described), f"{flag}: {described}"
    assert recipes.summary(name) in text


# length


def test_a_length_on_the_command_line_takes_the_place_of_the_recipes_own():
    own = recipes.load("dcgan_digits").length
    assert parsed("--steps", "7").length == Length(steps=7)
    assert parsed("--epochs", "2").length == Length(epochs=2)
    assert parsed("--kimg", "5").length == Length(kimg=5)
    assert parsed("--kimg", str(own.kimg)).length == own
    assert parsed().length == own


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "7", "--epochs", "2"),
        ("--kimg", "5", "--steps", "7"),
        ("--kimg", str(recipes.load("dcgan_digits").length.kimg), "--steps", "7"),  # its own
    ],
)
def test_two_lengths_are_refused(arguments):
    with pytest.raises(ValueError, match="give one of --"):
        parsed(*arguments)


@pytest.mark.parametrize(
    ("length", "images"),
    [
        (Length(kimg=0.1), 128),
        (Length(kimg=0.128), 128),
        (Length(kimg=0.129), 192),
        (Length(kimg=1), 1024),
        (Length(epochs=1), 1024),
        (Length(epochs=0.5), 512),
        (Length(epochs=2.5), 2560),
        (Length(steps=3), 192),
    ],
)
def test_the_length_in_images_is_rounded_up_to_whole_batches(length, images):
    recipe = replace(recipes.load("dcgan_digits"), length=length)
    assert recipe.data.batch == 64
    assert recipes.total_images(recipe, 1000) == images
