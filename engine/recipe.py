"""Recipes by name, from the command line, and to and from JSON."""

import functools
import hashlib
import importlib
import json
import math
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine import track
from engine.networks.spec import ImageSpec
from engine.settings import Inline, Length, Metrics, PlayerSettings, Recipe

FOLDER = Path(__file__).parent / "recipes"

# What a resumed run may be given anew; everything else defines the run.
MAY_CHANGE = (
    *(f"{part}." for part in ("length", "outputs", "metrics")),
    *(f"data.{name}" for name in ("root", "path", "cache", "workers", "download", "on_error")),
    *(
        "convolutions",
        "device",
        "graph",
        "memory_format",
        "probe",
        "on_nan",
        "parallel",
        "batch_per_rank",
        "hang_after",
    ),
    # runs whose content is pinned by step.encoders_digest and step.vqvae_digest
    *("step.damsm", "step.vqvae"),
)


@dataclass(frozen=True)
class Command:
    """One training command: a recipe and what to do with it."""

    recipe: Annotated[Recipe, Inline]
    run: Annotated[str | None, tyro.conf.arg(aliases=("--run-name",))] = None
    """Name of the run's folder under runs/RECIPE; by default the settings decide it. (Behind
    torchrun say --run-name: it takes --run for an abbreviation of its own --run-path.)"""
    fresh: bool = False
    """Start anew beside an existing run instead of going on with it."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    dry_run: bool = False
    """Print what would be trained, and how, and stop."""
    compile_artifact: Path | None = None
    """File of compiled code that `launch.doctor --warm` wrote; what it lacks is compiled here. It
    is code, and runs: take only what you trust."""
    profile: bool = False
    """Write profile/ in the run's folder: a trace of a few iterations, and a page that says where
    their time goes."""


def names() -> list[str]:
    """Every recipe's name, sorted: the files of `engine/recipes/`."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> Recipe:
    """The recipe of that name; raises ValueError naming the nearest ones."""
    if name not in names():
        import difflib

        near = difflib.get_close_matches(name, names(), 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`--list` shows them all."
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return importlib.import_module(f"engine.recipes.{name}").recipe()


def source(name: str) -> Path:
    """The file that defines a recipe."""
    return FOLDER / f"{name}.py"


def summary(name: str) -> str:
    """First line of a recipe's docstring."""
    import ast

    docstring = ast.get_docstring(ast.parse(source(name).read_text())) or ""
    return docstring.split("\n", 1)[0]


def digest(name: str) -> str:
    """SHA-256 of the recipe's source file."""
    return hashlib.sha256(source(name).read_bytes()).hexdigest()


def parse(name: str, arguments: list[str]) -> Command:
    """The command for a recipe and its overrides; exits with code 2 and a message on bad input."""
    default = load(name)
    command = tyro.cli(
        Command,
        prog=f"python -m engine.train {name}",
        description=importlib.import_module(f"engine.recipes.{name}").__doc__,
        args=arguments,
        default=Command(recipe=default),
        config=(tyro.conf.AvoidSubcommands,),
    )
    length = _chosen_length(command.recipe.length, arguments)
    return replace(command, recipe=replace(command.recipe, length=length))


def _chosen_length(given: Length, arguments: list[str]) -> Length:
    """A length named on the command line takes the place of the recipe's own."""
    flags = {a.removeprefix("--").split("=", 1)[0] for a in arguments if a.startswith("--")}
    named = sorted(flags & {f.name for f in fields(Length)})
    if len(named) > 1:
        raise ValueError(f"give one of --{' and --'.join(named)}, not both")
    return Length(**{name: getattr(given, name) for name in named}) if named else given


def check(recipe: Recipe, world_size: int) -> None:
    """Raise ValueError, naming setting and remedy, for values that cannot be trained with."""
    _check_finite(recipe)
    if recipe.batch_per_rank is not None:
        _check_batch_per_rank(recipe, world_size)
    parts = world_size * recipe.accumulate
    if recipe.accumulate < 1 or recipe.data.batch < 1:
        raise ValueError("data.batch and accumulate must be at least 1")
    if recipe.data.batch % parts:
        near = max(recipe.data.batch // parts, 1) * parts
        raise ValueError(
            f"data.batch={recipe.data.batch} does not divide into {world_size} ranks x "
            f"{recipe.accumulate} micro-batches; try --data.batch {near}"
        )
    values = [getattr(recipe.length, f.name) for f in fields(Length)]
    given = [v for v in values if v is not None]
    if len(given) != 1 or not 0 < given[0] < math.inf:
        raise ValueError("the length must be one positive number of --kimg, --epochs or --steps")
    if recipe.seed < 0 or recipe.data.workers < 0 or recipe.hang_after < 0:
        raise ValueError("--seed, --data.workers and --hang-after must not be negative")
    _check_outputs(recipe)
    _check_metrics(recipe.metrics)
    recipe.step.check()
    recipe.step.check_data(recipe.data)
    for name, player in recipe.step.players().items():
        _check_player(name, player)
    if recipe.data.without and recipe.step.told():
        raise ValueError(
            "--data.without is for models that are not told the class: this one would still be "
            "asked for those that it has never seen"
        )


def check_classes(recipe: Recipe, classes: int) -> None:
    """Raise ValueError where networks are given classes that the dataset has not so many of."""
    told = recipe.step.told()
    for name, wanted in told.items():
        if wanted != classes:
            has = f"has {classes} classes" if classes else "has no classes"
            flags = " ".join(f"--{other}.classes {classes}" for other in told)
            remedy = f"give {flags}" if classes else "take a labelled dataset"
            raise ValueError(
                f"--{name}.classes {wanted}, but data.name={recipe.data.name} {has}: {remedy}"
            )


def check_captions(recipe: Recipe, words: tuple[str, ...]) -> None:
    """Raise ValueError where a model is to read captions of a dataset that has none, too many
    different words, or others than it was given; `words` is their vocabulary."""
    if recipe.step.reads_captions() and not words:
        raise ValueError(
            f"data.name={recipe.data.name} has no captions, which this model reads: take birds, or "
            f"a folder of .tar shards with a .txt beside each image"
        )
    for name, player in recipe.step.players().items():
        if 0 < player.network.words < len(words):
            raise ValueError(
                f"--{name}.words {player.network.words}: the captions have {len(words):,} "
                f"different words, the end included; give that"
            )
    recipe.step.check_words(words)


def _check_batch_per_rank(recipe: Recipe, world_size: int) -> None:
    images, batch = recipe.batch_per_rank, recipe.data.batch
    if recipe.accumulate != 1:
        raise ValueError("give --batch-per-rank or --accumulate, not both")
    if images != "auto" and images < 1:
        raise ValueError(f"--batch-per-rank {images} must be at least 1")
    if images != "auto" and batch % (images * world_size):
        own = batch // world_size
        near = next((n for n in range(min(images, own), 0, -1) if batch % (n * world_size) == 0), 1)
        raise ValueError(
            f"--batch-per-rank {images} on {world_size} rank(s) does not make up "
            f"data.batch={batch} in whole micro-batches; try {near}, or auto"
        )


def _check_finite(recipe: Recipe) -> None:
    for flag, value in flatten(recipe, flags=True).items():
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise ValueError(f"--{flag} {v} is no number to train with: give a finite one")


def _check_metrics(metrics: Metrics) -> None:
    if metrics.every_kimg < 0 or metrics.real < 0:
        raise ValueError("--metrics.every-kimg and --metrics.real must not be negative")
    if metrics.generated < 1:
        raise ValueError(f"--metrics.generated {metrics.generated} is too few: give at least 1")
    if metrics.weights is not None and not metrics.weights.is_file():
        raise ValueError(
            f"--metrics.weights {metrics.weights}: there is no such file; correct the path or "
            f"leave the flag out"
        )


def _check_player(name: str, player: PlayerSettings) -> None:
    for f in fields(player.network):
        value = getattr(player.network, f.name)
        sizes = value if isinstance(value, tuple) else (value,)
        least = 0 if f.name == "classes" and f.default == 0 else 1
        if any(type(v) is int and v < least for v in sizes):
            raise ValueError(f"--{name}.{f.name} {value} is no size: give at least {least}")
    optimizer = player.optimizer
    if not optimizer.lr > 0:
        raise ValueError(f"--{name}.lr {optimizer.lr} must be positive")
    for rates in ("betas", "alpha"):
        given = getattr(optimizer, rates, 0.0)
        if not all(0 <= rate < 1 for rate in (given if isinstance(given, tuple) else (given,))):
            raise ValueError(f"--{name}.{rates} {given} must be at least 0 and below 1")


def _check_outputs(recipe: Recipe) -> None:
    outputs = recipe.outputs
    for name in ("log_every", "sample_every", "checkpoint_every"):
        if not getattr(outputs, name) > 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be positive (thousands of images)")
    if outputs.keep < 1 or outputs.samples < 1:
        raise ValueError("--keep and --samples must be at least 1")
    track.check(outputs.track)


def total_images(recipe: Recipe, dataset_images: int) -> int:
    """Length of the run in images, rounded up to whole batches."""
    length, batch = recipe.length, recipe.data.batch
    if length.steps is not None:
        return length.steps * batch
    images = length.kimg * 1000 if length.kimg is not None else length.epochs * dataset_images
    return -(-round(images) // batch) * batch


def image_spec(recipe: Recipe, classes: int = 0) -> ImageSpec:
    """Shape of the recipe's images."""
    data = recipe.data
    return ImageSpec(data.channels, data.resolution, classes, data.scale or 1)


def to_values(settings: Any) -> dict[str, Any]:
    """Nested plain values of a settings dataclass, ready for JSON."""
    values = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            value = to_values(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[f.name] = value
    return values


def from_values(default: Any, values: dict[str, Any]) -> Any:
    """The settings of `default`'s type with stored values; fields that are not stored keep their
    default. Raises ValueError for a stored field that no longer exists."""
    known = {f.name for f in fields(default)}
    if unknown := set(values) - known:
        raise ValueError(f"stored settings {sorted(unknown)} are unknown to this version")
    hints = typing.get_type_hints(type(default))
    changes = {}
    for name, value in values.items():
        old = getattr(default, name)
        if is_dataclass(old):
            changes[name] = from_values(old, value)
        elif isinstance(value, list):
            changes[name] = tuple(value)
        elif Path in typing.get_args(hints[name]) and value is not None:
            changes[name] = Path(value)
        else:
            changes[name] = value
    return replace(default, **changes)


def flatten(settings: Any, prefix: str = "", flags: bool = False) -> dict[str, Any]:
    """Settings as {dotted path: value}; with `flags`, named as on the command line."""
    flat = {}
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for f in fields(settings):
        value = getattr(settings, f.name)
        inline = flags and Inline in getattr(hints[f.name], "__metadata__", ())
        path = prefix if inline else f"{prefix}{f.name}"
        if is_dataclass(value):
            flat |= flatten(value, path if inline else f"{path}.", flags)
        else:
            flat[path.replace("_", "-") if flags else path] = value
    return flat


def may_change(path: str) -> bool:
    """Whether a resumed run may be given this setting anew."""
    return any(path == name or (path.startswith(name) and name[-1] == ".") for name in MAY_CHANGE)


def identity(recipe: Recipe, digests: dict[str, str] | None = None) -> dict[str, Any]:
    """The settings that define a run, by dotted path, as plain values. Files count by their content
    and may lie elsewhere: by `digests`, as a run has stored them, else by what is there now."""
    settings = {path: v for path, v in flatten(recipe).items() if not may_change(path)}
    known = file_digests(recipe) if digests is None else digests
    return {path: known.get(path, _plain(v)) for path, v in settings.items()}


def file_digests(recipe: Recipe) -> dict[str, str]:
    """Of the files that define a run, as far as they are there, by the setting's dotted path."""
    settings = flatten(recipe).items()
    files = {path: v for path, v in settings if isinstance(v, Path) and not may_change(path)}
    return {path: _file_digest(v, v.stat().st_mtime_ns) for path, v in files.items() if v.is_file()}


@functools.cache
def _file_digest(path: Path, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1000 and 1000.0 are the same setting
    return str(value) if isinstance(value, Path) else value


def run_name(recipe: Recipe) -> str:
    """A stable name for the run of these settings: the same command finds it again."""
    text = json.dumps(identity(recipe), sort_keys=True)
    return f"seed{recipe.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def contradictions(
    recipe: Recipe, stored: Recipe, digests: dict[str, str] | None = None
) -> list[str]:
    """One line for each setting that defines the run and differs from the stored run's. digests:
    what the stored run says of its files."""
    now, before = identity(recipe), identity(stored, digests)
    flags = dict(zip(flatten(recipe), flatten(recipe, flags=True), strict=True))
    return [
        f"--{flags[path]}: the run has {before.get(path)}, this command says {now[path]}"
        for path in now
        if now[path] != before.get(path)
    ]
