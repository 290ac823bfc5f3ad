"""Checkpoints: what a run needs to go on exactly, written so that a kill at any moment loses none.

    checkpoints/000012800/            named by the images seen
        shared.safetensors            networks, averages, optimizer states
        shard-00000.safetensors       a rank's pieces of those that are spread over the ranks
        rank-00000.safetensors        what differs between ranks: buffers
        checkpoint.json               progress, settings, and the SHA-256 of each part

A checkpoint is written under a temporary name, synced to disk and renamed, so that it is there
whole or not at all. Loading verifies every digest and never unpickles.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine.parallel import Piece, State
from engine.player import Player
from engine.recipe import to_values
from engine.session import Session
from engine.stored import INDEX, SHARED, CheckpointError, Loaded, rank_part, shard_part
from engine.world import Ranks

BEST = "best.json"


# -- what is in it ---------------------------------------------------------------------------------


def shared_tensors(session: Session) -> State:
    """Everything that is the same on all ranks, or spread over them, by a path of names."""
    tensors: State = {}
    for name, player in session.players.items():
        persistent = player.network.state_dict().keys()
        buffers = dict(player.network.named_buffers())
        tensors |= _prefixed(f"{name}/network", player.shared.parameters())
        tensors |= _prefixed(f"{name}/network", _only(persistent, buffers))
        if player.average:
            tensors |= _prefixed(f"{name}/average", player.average.parameters())
            tensors |= _prefixed(f"{name}/average", _only(persistent, player.average.buffers()))
        tensors |= _prefixed(f"{name}/optimizer", player.shared.moments())
        if player.scaler and player.scaler.state_dict():
            state = player.scaler.state_dict()
            values = {k: torch.tensor(float(state[k])) for k in ("scale", "_growth_tracker")}
            tensors |= _prefixed(f"{name}/scaler", values)
    return tensors


def local_tensors(session: Session) -> dict[str, Tensor]:
    """What differs between ranks: buffers (running statistics of each rank's own batches)."""
    tensors: dict[str, Tensor] = {}
    for name, player in session.players.items():
        tensors |= _prefixed(f"{name}/network", dict(player.network.named_buffers()))
        if player.average:
            tensors |= _prefixed(f"{name}/average", player.average.buffers())
    return tensors


def _prefixed(prefix: str, tensors: State) -> State:
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def _only(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names if name in tensors}


@torch.no_grad()
def restore(session: Session, loaded: Loaded) -> None:
    """Put a checkpoint's state into a session, from however many ranks and however shared. Raises
    CheckpointError if it does not fit the session's networks."""
    stored = loaded.shared
    for name, player in session.players.items():
        player.optimizer.state.clear()
        if any(path.startswith(f"{name}/optimizer/") for path in stored):
            player.shared.make_moments()
    try:
        for path, held in shared_tensors(session).items():
            _fill(held, stored, path)
        for path, tensor in local_tensors(session).items():
            _fill(tensor, loaded.local, path)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{loaded.folder} does not fit this recipe: {error}") from error
    for name, player in session.players.items():
        player.shared.loaded()
        _restore_scaler(name, player, stored)
    session.clock.seek(loaded.images)
    session.change_noise(loaded.index["salt"])


def _fill(held: Tensor | Piece, stored: Mapping[str, Tensor], path: str) -> None:
    if "/scaler/" in path:  # plain numbers, see _restore_scaler
        return
    if isinstance(held, Piece):
        shape, values = stored.shape(path), stored.part(path, held.begin, len(held.values))
    else:
        shape, values = tuple(stored[path].shape), stored[path]
    if shape != tuple(held.shape):  # copy_ would broadcast
        raise KeyError(f"{path} is {shape}, here {tuple(held.shape)}")
    (held.values if isinstance(held, Piece) else held).copy_(values)


def _restore_scaler(name: str, player: Player, stored: Mapping[str, Tensor]) -> None:
    if player.scaler and f"{name}/scaler/scale" in stored:
        state = player.scaler.state_dict()
        state["scale"] = float(stored[f"{name}/scaler/scale"])
        state["_growth_tracker"] = int(stored[f"{name}/scaler/_growth_tracker"])
        player.scaler.load_state_dict(state)


# -- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A copy on the host of all that this rank saves, so that training can go on meanwhile."""

    parts: dict[str, dict[str, Tensor]]
    """By file."""
    index: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return f"{self.index['images']:09}"


def capture(session: Session, facts: dict[str, Any], keep_for_good: bool = False) -> Moment:
    """This moment of the run, on this rank. facts: what else the index holds (recipe, dataset)."""
    state = shared_tensors(session)
    pieces = {path: held for path, held in state.items() if isinstance(held, Piece)}
    parts = {rank_part(session.ranks.rank): local_tensors(session)}
    if pieces:
        parts[shard_part(session.ranks.rank)] = {p: held.values for p, held in pieces.items()}
    if session.ranks.rank == 0:
        parts[SHARED] = {path: held for path, held in state.items() if path not in pieces}
    host = {name: {p: _copy(t) for p, t in part.items()} for name, part in parts.items()}
    shapes = {path: list(piece.shape) for path, piece in pieces.items()}
    return Moment(host, _index(session, facts, shapes, keep_for_good))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def write(moment: Moment, folder: Path, ranks: Ranks) -> Path:
    """Write what was captured; every rank calls it. Gives the checkpoint's folder.

    Raises CheckpointError on all ranks if any of them cannot write; what was there before stays
    whole.
    """
    target = folder / moment.name
    scratch = folder / f".writing-{moment.name}"
    if ranks.share(ranks.rank == 0 and _holds(target, moment)):
        return target
    problem = ""
    if ranks.rank == 0:
        problem = _try(lambda: _make_empty(scratch))
    problem = ranks.share(problem)
    digests: dict[str, str] = {}
    if not problem:
        mine = _try(lambda: digests.update(_write_parts(scratch, moment.parts)))
        results = ranks.gather((mine, digests))
        problem = next((p for p, _ in results if p), "")
        digests = {k: v for _, part in results for k, v in part.items()}
    if not problem and ranks.rank == 0:
        problem = _try(lambda: _finish(scratch, target, moment.index | {"sha256": digests}))
    problem = ranks.share(problem)
    if problem:
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {target}: {problem}")
    return target


def save(
    session: Session, folder: Path, facts: dict[str, Any], keep_for_good: bool = False
) -> Path:
    """Capture and write, now."""
    return write(capture(session, facts, keep_for_good), folder, session.ranks)


def _holds(target: Path, moment: Moment) -> bool:
    """Whether this very moment is saved already: the run is a function of images and noise."""
    if not target.exists() or damage_of(target):
        return False
    return json.loads((target / INDEX).read_text())["salt"] == moment.index["salt"]


def _try(write: Callable[[], Any]) -> str:
    """Run a write; what went wrong with the disk, or an empty text."""
    try:
        write()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error}); free some space and run the same command again"
        return str(error)
    return ""


def _make_empty(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _write_parts(scratch: Path, parts: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    digests = {}
    for name, tensors in parts.items():
        data = safetensors.torch.save(tensors)
        write_synced(scratch / name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def _digest_of(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _index(
    session: Session, facts: dict[str, Any], shapes: dict[str, list[int]], keep_for_good: bool
) -> dict[str, Any]:
    return {
        "format": 1,
        "images": session.clock.images,
        "world_size": session.ranks.world_size,
        "parallel": session.recipe.parallel,
        "salt": session.salt,
        "keep_for_good": keep_for_good,
        "settings": to_values(session.recipe),
        "sharded": shapes,
        **facts,
    }


def _finish(scratch: Path, target: Path, index: dict[str, Any]) -> None:
    index = index | {"index_sha256": _digest_of(index)}
    write_synced(scratch / INDEX, json.dumps(index, indent=1).encode())
    _sync_folder(scratch)
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(scratch, target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_best(folder: Path, best: dict[str, Any]) -> None:
    """Note which checkpoint is the best: images, metric, value, protocol. `prune` keeps it."""
    scratch = folder / f".{BEST}"
    write_synced(scratch, json.dumps(best).encode())
    os.replace(scratch, folder / BEST)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The best checkpoint so far, as `write_best` noted it, if it is still there."""
    try:
        best = json.loads((folder / BEST).read_text())
        there = (folder / f"{best['images']:09}").is_dir()
        return best if there and {"metric", "value"} <= best.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, the best, and those kept for good. Rank 0's
    work."""
    best = read_best(folder)
    for old in listing(folder)[keep:]:
        is_best = best is not None and int(old.name) == best["images"]
        if not is_best and not _kept_for_good(old):
            shutil.rmtree(old, ignore_errors=True)
    for left in (*folder.glob(".writing-*"), *folder.glob(".old-*")):
        shutil.rmtree(left, ignore_errors=True)


def _kept_for_good(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / INDEX).read_text())["keep_for_good"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- reading ---------------------------------------------------------------------------------------


def listing(folder: Path) -> list[Path]:
    """Checkpoints that were finished, newest first, not verified."""
    found = [p for p in folder.glob("*") if p.name.isdigit()] if folder.exists() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def newest_whole(folder: Path, say: Callable[[str], None], set_aside: bool = False) -> Path | None:
    """The newest checkpoint whose parts are all there with the right digests.

    Damaged ones are named through `say`; with `set_aside` they are renamed, so that they neither
    count among the newest nor are in the way.
    """
    there = listing(folder)
    for candidate in there:
        damage = damage_of(candidate)
        if not damage:
            return candidate
        rest = "using the one" if candidate != there[-1] else "there is none"
        say(f"checkpoint {candidate} is damaged ({damage}); {rest} before it")
        if set_aside:
            os.rename(candidate, unused_name(candidate.with_name(f"{candidate.name}.damaged")))
    return None


def unused_name(path: Path) -> Path:
    """The path itself if nothing is there, else the first of path.2, path.3, ... that is free."""
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.name}.{number}")
        number += 1
    return free


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty if all are whole."""
    try:
        index = json.loads((checkpoint / INDEX).read_text())
        if index.pop("index_sha256") != _digest_of(index):
            return f"{INDEX}: wrong SHA-256"
        for name, digest in index["sha256"].items():
            if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
                return f"{name}: wrong SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{INDEX}: {error}"
    return ""
