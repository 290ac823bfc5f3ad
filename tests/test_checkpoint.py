"""Checkpoints: does the saved session come back bit for bit, on any rank, at its own sizes only?"""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointError, newest_whole, restore, save
from engine.networks import vae
from engine.networks.spec import Network
from engine.session import Session
from engine.settings import PlayerSettings, Recipe
from engine.steps.autoencoder import Variational
from engine.stored import Loaded
from pipelines.settings import Data
from tests.checkpoints import BATCH, FACTS, advance, names, recipe_of, started


def state_of(live: Session) -> dict[str, Tensor]:
    return checkpoint.shared_tensors(live) | checkpoint.local_tensors(live)


def assert_same_state(left: Session, right: Session) -> None:
    """Bit for bit, in values and in memory layout."""
    ours, theirs = state_of(left), state_of(right)
    assert ours.keys() == theirs.keys()
    for path, tensor in ours.items():
        assert torch.equal(tensor, theirs[path]), path
        assert tensor.stride() == theirs[path].stride(), path
        assert tensor.dtype == theirs[path].dtype, path
    assert left.clock.images == right.clock.images
    assert torch.equal(left.clock.device_images, right.clock.device_images)
    assert torch.equal(left.key, right.key) and left.salt == right.salt


# round trip


def test_a_restored_session_is_the_saved_one_bit_for_bit(folder):
    live = advance(started(), 3)
    live.change_noise(2)
    path = save(live, folder, FACTS)
    assert path == folder / "000000024" and newest_whole(folder, pytest.fail) == path
    fresh = started(recipe_of(seed=9))
    fresh.recipe = live.recipe
    restore(fresh, Loaded(path))
    assert_same_state(fresh, live)


def test_resumed_equals_unbroken_bit_for_bit(folder):
    unbroken = advance(started(), 5)
    broken = advance(started(), 2)
    resumed = started()
    restore(resumed, Loaded(save(broken, folder, FACTS)))
    assert_same_state(advance(resumed, 3), unbroken)


def test_a_session_that_went_astray_comes_back_bit_for_bit(folder):
    live = advance(started(), 2)
    path = save(live, folder, FACTS)
    wanted = {k: v.clone() for k, v in state_of(live).items()}
    advance(live, 2)
    assert not all(torch.equal(v, wanted[k]) for k, v in state_of(live).items())
    restore(live, Loaded(path))
    assert all(torch.equal(v, wanted[k]) for k, v in state_of(live).items())
    assert live.clock.images == 16


def test_restored_tensors_keep_their_address_and_channels_last_layout(folder):
    live = advance(started(), 1)
    path = save(live, folder, FACTS)
    fresh = started(recipe_of(seed=9))
    before = {k: v.data_ptr() for k, v in state_of(fresh).items()}
    restore(fresh, Loaded(path))
    after = state_of(fresh)
    assert all(after[k].data_ptr() == pointer for k, pointer in before.items())
    player = fresh.players["discriminator"]
    weight = player.network.layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for key in ("exp_avg", "exp_avg_sq"):
        assert player.optimizer.state[weight][key].stride() == weight.stride()


def test_a_session_that_was_never_trained_can_be_saved(folder):
    path = save(started(), folder, FACTS)
    fresh = started(recipe_of(seed=9))
    restore(fresh, Loaded(path))
    assert path.name == "000000000" and fresh.clock.images == 0
    advance(fresh, 1)


def test_the_loss_scale_of_fp16_is_kept(folder):
    recipe = Recipe(
        data=Data(resolution=16, channels=1, batch=BATCH),
        step=Variational(autoencoder=PlayerSettings(vae.Dense(8, 4))),
    )
    live = advance(started(recipe, "fp16"), 2)
    live.players["autoencoder"].scaler.update(128.0)
    fresh = started(recipe, "fp16")
    restore(fresh, Loaded(save(live, folder, FACTS)))
    ours, theirs = (s.players["autoencoder"].scaler.state_dict() for s in (fresh, live))
    assert ours == theirs and ours["scale"] == 128


def test_the_index_says_what_the_checkpoint_is(three):
    index = json.loads((three[2] / "checkpoint.json").read_text())
    assert (index["images"], index["world_size"], index["salt"]) == (24, 1, 0)
    assert index["recipe"] == "toy" and index["dataset"] == "abc"
    assert index["settings"]["step"]["generator"]["network"]["width"] == 4
    assert set(index["sha256"]) == {"shared.safetensors", "rank-00000.safetensors"}
    assert names(three[2]) == sorted([*index["sha256"], "checkpoint.json"])


# loading never unpickles


def test_loading_never_unpickles(three, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("something was unpickled")

    for owner, name in [
        *((pickle, n) for n in ("load", "loads", "Unpickler", "_Unpickler")),
        (torch, "load"),
    ]:
        monkeypatch.setattr(owner, name, refuse)
    restore(started(), Loaded(three[2]))


def test_nothing_in_the_engine_unpickles():
    """torch.load is for a user's files of Inception's and VGG's weights, restricted to tensors."""
    sources = list(Path(checkpoint.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    calls = {}
    for source in sources:
        assert not re.search(r"import pickle", source.read_text()), source
        if found := re.findall(r"(?<!safetensors\.)torch\.load\((.*)\)", source.read_text()):
            calls[source.name] = found
    assert calls.keys() == {"extractor.py", "weights.py"}
    assert all("weights_only=True" in call for found in calls.values() for call in found)


# other ranks, other sizes


def test_each_rank_takes_its_own_part_and_a_new_one_that_of_rank_0(three):
    path, index_path = three[2], three[2] / "checkpoint.json"
    own = load_file(path / "rank-00000.safetensors")
    other = {k: torch.full_like(v, 7) for k, v in own.items()}
    save_file(other, path / "rank-00001.safetensors")
    index = json.loads(index_path.read_text()) | {"world_size": 2}
    index_path.write_text(json.dumps(index))
    assert own.keys() == Loaded(path, 0).local.keys()
    for rank, wanted in ((0, own), (1, other), (2, own), (5, own)):
        assert all(torch.equal(v, wanted[k]) for k, v in Loaded(path, rank).local.items())
    live = started()
    restore(live, Loaded(path, 1))
    assert all((b == 7).all() for b in live.state_tensors())


@pytest.mark.parametrize(
    "other",
    [
        recipe_of(width=8),
        recipe_of(channels=3),  # a first layer of one input channel would broadcast to three
        replace(
            recipe_of(),
            step=Variational(autoencoder=PlayerSettings(vae.Dense(8, 4))),
        ),
    ],
    ids=["width", "channels", "family"],
)
def test_a_checkpoint_of_other_sizes_is_refused(other, three):
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        restore(started(other), Loaded(three[2]))


def test_a_checkpoint_without_an_average_is_refused_where_one_is_kept(folder):
    path = save(advance(started(recipe_of(ema=0)), 1), folder, FACTS)
    with pytest.raises(CheckpointError, match="generator/average"):
        restore(started(), Loaded(path))


def test_networks_are_dataclasses_that_a_checkpoint_index_can_rebuild(three):
    from engine.recipe import from_values

    stored = Loaded(three[2]).index["settings"]
    assert from_values(recipe_of(width=32, seed=5), stored) == recipe_of()
    assert isinstance(from_values(recipe_of(), stored).step.generator.network, Network)
