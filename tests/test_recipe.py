"""Recipes: by name, what is refused, to and from JSON, and the name of their run."""

import ast
import contextlib
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine import recipe as recipes
from engine import train
from engine.networks.spec import ImageSpec
from engine.settings import Length, Recipe
from tests.runs import parsed

NAMES = recipes.names()


# by name


def test_every_recipe_file_loads():
    assert {"dcgan_digits", "gan_mnist", "vae_mnist", "beta_vae_celeba"} <= set(NAMES)
    for name in NAMES:
        assert isinstance(recipes.load(name), Recipe)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no recipe 'dcgan_celebs'; did you mean dcgan_celeba"):
        recipes.load("dcgan_celebs")
    with pytest.raises(ValueError, match=r"no recipe 'xyzzy'; `--list` shows them all"):
        recipes.load("xyzzy")
    with pytest.raises(ValueError, match="no recipe '__init__'"):
        recipes.load("__init__")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_file_is_short_and_says_its_paper_and_command(name):
    text = recipes.source(name).read_text()
    assert 20 <= len(text.splitlines()) <= 50
    docstring = ast.get_docstring(ast.parse(text))
    assert re.search(r"https://\S+\w", docstring)
    assert re.search(rf"^ {{4}}(python|torchrun .*) -?-?m engine\.train {name}$", docstring, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_trained_by_one_two_or_four_ranks(name):
    """Those whose papers train on single images say what batch several ranks could have."""
    recipe = recipes.load(name)
    recipes.check(recipe, 1)
    for ranks in (2, 4):
        single = pytest.raises(ValueError, match=f"try --data.batch {ranks}")
        with single if recipe.data.batch == 1 else contextlib.nullcontext():
            recipes.check(recipe, ranks)


def test_the_list_shows_every_recipe_with_its_first_line(capsys):
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    files = [p for p in recipes.FOLDER.glob("*.py") if p.stem != "__init__"]
    assert set(shown) == {p.stem for p in files} == set(NAMES)
    for path in files:
        first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        assert first and shown[path.stem] == first


def test_the_digest_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "mine.py").write_text("x = 1\n")
    before = recipes.digest("mine")
    assert before == hashlib.sha256(b"x = 1\n").hexdigest()
    (tmp_path / "mine.py").write_text("x = 2\n")
    assert recipes.digest("mine") != before


# check


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    recipe = parsed("--data.batch", "10")
    recipes.check(recipe, 5)
    with pytest.raises(ValueError, match=r"data\.batch=10 .* 4 ranks .*try --data\.batch 8"):
        recipes.check(recipe, 4)
    with pytest.raises(ValueError, match=r"3 micro-batches; try --data\.batch 6"):
        recipes.check(replace(recipe, accumulate=3), 2)
    small = parsed("--data.batch", "3")
    with pytest.raises(ValueError, match=r"try --data\.batch 16"):
        recipes.check(small, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--accumulate", "0"), "data.batch and accumulate must be at least 1"),
        (("--accumulate", "-2"), "data.batch and accumulate must be at least 1"),
        (("--data.batch", "0"), "data.batch and accumulate must be at least 1"),
        (("--steps", "0"), "one positive number"),
        (("--epochs", "-1"), "one positive number"),
        (("--log-every", "0"), "--log-every must be positive"),
        (("--sample-every", "-1"), "--sample-every must be positive"),
        (("--checkpoint-every", "0"), "--checkpoint-every must be positive"),
        (("--keep", "0"), "--keep and --samples must be at least 1"),
        (("--samples", "0"), "--keep and --samples must be at least 1"),
        (("--metrics.every-kimg", "nan"), "--metrics.every-kimg nan"),
        (("--kimg", "inf"), "--kimg inf"),
        (("--log-every", "inf"), "--log-every inf"),
        (("--generator.lr", "inf"), "--generator.lr inf"),
        (("--discriminator.betas", "0.5", "nan"), "--discriminator.betas nan"),
        (("--generator.ema-kimg", "nan"), "--generator.ema-kimg nan"),
        (("--generator.decay-kimg", "-inf"), "--generator.decay-kimg -inf"),
        (("--r1", "nan"), "--r1 nan"),
        (("--metrics.every-kimg", "-1"), "must not be negative"),
        (("--metrics.generated", "0"), "--metrics.generated 0 is too few: give at least 1"),
        (("--metrics.weights", "no.pth"), "--metrics.weights no.pth: there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_values_that_cannot_be_trained_with_are_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        recipes.check(parsed(*arguments), 1)


def test_a_recipe_of_no_length_or_two_is_refused():
    for length in (Length(), Length(kimg=1, steps=1)):
        with pytest.raises(ValueError, match="one positive number of --kimg, --epochs or --steps"):
            recipes.check(replace(recipes.load("dcgan_digits"), length=length), 1)


# JSON


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_json_equal(name):
    default = recipes.load(name)
    stored = json.loads(json.dumps(recipes.to_values(default)))
    assert recipes.from_values(default, stored) == default


def test_overridden_settings_come_back_from_json():
    recipe = parsed(
        *("--data.path", "/a/b", "--generator.hidden", "5", "6"),
        *("--generator.betas", "0.1", "0.2", "--steps", "9", "--data.crop", "20"),
        name="gan_mnist",
    )
    default = recipes.load("gan_mnist")
    back = recipes.from_values(default, json.loads(json.dumps(recipes.to_values(recipe))))
    assert back == recipe != default
    assert back.data.path == Path("/a/b") and back.step.generator.network.hidden == (5, 6)


def test_a_setting_that_was_not_stored_keeps_its_default_and_an_unknown_one_is_refused():
    recipe = parsed("--seed", "4")
    values = recipes.to_values(recipe)
    del values["seed"], values["data"]["flip"]
    assert recipes.from_values(recipe, values) == recipe
    with pytest.raises(ValueError, match=r"stored settings \['colour'\] are unknown"):
        recipes.from_values(recipe, values | {"colour": 3})
    values["data"]["smell"] = 3
    with pytest.raises(ValueError, match=r"stored settings \['smell'\] are unknown"):
        recipes.from_values(recipe, values)


def test_the_image_spec_is_that_of_the_data():
    assert recipes.image_spec(recipes.load("dcgan_celeba"), 10) == ImageSpec(3, 64, 10)


# the run


def test_the_run_name_is_stable_and_shows_the_seed():
    name = recipes.run_name(recipes.load("dcgan_digits"))
    assert name == recipes.run_name(parsed()) == recipes.run_name(recipes.load("dcgan_digits"))
    assert re.fullmatch(r"seed0-[0-9a-f]{8}", name)
    assert recipes.run_name(parsed("--seed", "3")).startswith("seed3-")


def test_the_run_name_differs_with_every_setting_that_defines_the_run():
    changes = (
        *(("--seed", "1"), ("--generator.lr", "3e-5"), ("--generator.width", "8")),
        *(("--discriminator.betas", "0.5", "0.9"), ("--joint",), ("--data.batch", "32")),
        *(("--data.resolution", "32"), ("--data.flip",), ("--accumulate", "2")),
        ("--sync-bn", "on"),
        *(("--precision", "fp32"), ("--generator.ema-kimg", "7"), ("--data.name", "synthetic")),
    )
    seen = {recipes.run_name(parsed(*change)) for change in ((), *changes)}
    assert len(seen) == len(changes) + 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kimg", "900"),
        ("--steps", "9"),
        ("--log-every", "1", "--sample-every", "3", "--samples", "9"),
        ("--checkpoint-every", "1", "--keep", "5", "--keep-every", "10"),
        ("--data.root", "/elsewhere", "--data.path", "/there", "--data.cache", "/cache"),
        ("--data.workers", "7", "--data.download", "--data.on-error", "skip"),
        ("--device", "cpu", "--on-nan", "rollback"),
    ],
    ids=" ".join,
)
def test_the_run_name_stays_where_only_length_outputs_or_places_change(arguments):
    default, changed = parsed(), parsed(*arguments)
    assert changed != default
    assert recipes.run_name(changed) == recipes.run_name(default)
    assert recipes.contradictions(changed, default) == []


def test_a_setting_spelt_out_at_its_default_leaves_the_run_name():
    recipe = recipes.load("vae_celeba")
    settings = recipes.flatten(recipe, flags=True)
    for flag in ("data.batch", "beta", "autoencoder.lr", "autoencoder.decay-kimg"):
        spelt = parsed(f"--{flag}", str(settings[flag]), name="vae_celeba")
        assert recipes.run_name(spelt) == recipes.run_name(recipe), flag


def test_contradictions_name_the_flag_and_both_values():
    default = parsed()
    assert recipes.contradictions(default, default) == []
    others = ("--sync-bn", "on", "--data.batch", "32", "--steps", "3")
    changed = parsed("--generator.width", "8", *others)
    assert sorted(recipes.contradictions(changed, default)) == [
        "--data.batch: the run has 64, this command says 32",
        "--generator.width: the run has 128, this command says 8",
        "--sync-bn: the run has auto, this command says on",
    ]
    (line,) = recipes.contradictions(parsed("--discriminator.betas", "0.1", "0.9"), default)
    assert line == "--discriminator.betas: the run has [0, 0.99], this command says [0.1, 0.9]"


def test_a_run_without_a_later_setting_is_a_contradiction_only_where_it_differs():
    default = recipes.load("dcgan_digits")
    values = recipes.to_values(default)
    del values["sync_bn"]
    stored = recipes.from_values(default, values)
    assert recipes.contradictions(default, stored) == []
