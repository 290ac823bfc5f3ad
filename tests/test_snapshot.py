"""What a run shows of itself: every picture it is able to draw, and nothing of the run changed."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.algorithm import Algorithm
from engine.networks import vae
from engine.session import Session
from engine.settings import PlayerSettings
from engine.snapshot import Snapshots
from engine.steps.adversarial import Adversarial
from engine.steps.autoencoder import Variational
from pipelines.datasets import find
from tests.checkpoints import recipe_of, started


@dataclass(frozen=True)
class Blind(Adversarial):
    """A family that decodes no latents."""

    sampler = Algorithm.sampler


def session_of(step: Algorithm) -> Session:
    recipe = recipe_of()
    data = replace(recipe.data, name="synthetic")
    outputs = replace(recipe.outputs, samples=6)
    return started(replace(recipe, step=step, data=data, outputs=outputs))


def adversarial() -> Adversarial:
    return recipe_of().step


def blind() -> Blind:
    return Blind(**{f.name: getattr(adversarial(), f.name) for f in fields(Adversarial)})


def variational() -> Variational:
    return Variational(PlayerSettings(vae.Dense(hidden=8, latent=3)))


def taken(step: Algorithm, folder: Path) -> dict[str, float]:
    session = session_of(step)
    snapshots = Snapshots(session, folder, find(session.recipe.data))
    try:
        return snapshots.take()
    finally:
        snapshots.close()


def pictures_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


DRAWN = {"reals.png", "samples/000000000.png", "neighbours.png", "interpolation.png"}


def test_a_gan_shows_samples_neighbours_and_interpolation(tmp_path: Path) -> None:
    figures = taken(adversarial(), tmp_path)
    assert pictures_in(tmp_path) == DRAWN
    assert {"monitor/diversity", "monitor/neighbour_distance"} <= figures.keys()
    rows, columns = 4, 8
    width, height = Image.open(tmp_path / "interpolation.png").size
    assert round(width / height, 1) == columns / rows
    assert Image.open(tmp_path / "neighbours.png").text["Generated"] == "true"


def test_an_autoencoder_shows_reconstructions_too(tmp_path: Path) -> None:
    assert "monitor/neighbour_distance" in taken(variational(), tmp_path)
    assert pictures_in(tmp_path) == DRAWN | {"reconstruction.png"}


def test_a_family_without_latents_is_spared_their_pictures(tmp_path: Path) -> None:
    assert taken(blind(), tmp_path) == {}
    assert pictures_in(tmp_path) == {"reals.png"}


@pytest.mark.parametrize("step", [adversarial, variational])
def test_nothing_of_the_run_changes(step, tmp_path: Path) -> None:
    session = session_of(step())
    networks = [player.network for player in session.players.values()]
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    state = torch.get_rng_state()
    snapshots = Snapshots(session, tmp_path, find(session.recipe.data))
    snapshots.take()
    snapshots.take()
    snapshots.close()
    for network, old in zip(networks, before, strict=True):
        assert network.training
        assert all(torch.equal(v, old[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
