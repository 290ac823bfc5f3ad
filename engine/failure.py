"""Non-finite losses and gradients: the evidence, and going back to the last good checkpoint."""

import json

import safetensors.torch

from engine import checkpoint
from engine.checkpoint import unused_name
from engine.parallel import Piece
from engine.start import Training
from engine.stored import Loaded

ROLLBACKS = 3


class NonFinite(RuntimeError):
    """Losses or gradients were not finite; `counts` has the updates by (player, what)."""

    def __init__(self, counts: dict[tuple[str, str], float], images: int) -> None:
        self.counts = {k: n for k, n in counts.items() if n}
        # The update that failed first has failed most often; what it fed failed after it.
        self.player, _ = max(self.counts, key=lambda k: self.counts[k])
        # A loss that is not finite makes the gradient so, on all ranks.
        self.what = "loss" if (self.player, "loss") in self.counts else "gradient"
        others = sorted({p for p, _ in self.counts} - {self.player})
        then = f" (and then that of the {', '.join(others)})" if others else ""
        super().__init__(
            f"the {self.what} of the {self.player} was not finite{then} at or shortly before "
            f"{images:,} images; try --on-nan rollback, a lower --{self.player}.lr, "
            f"--{self.player}.clip 1, or --precision fp32"
        )


def write_evidence(t: Training, failure: NonFinite) -> None:
    """Write what is needed to look into it to RUN/nan-IMAGES: the players' state (updates that
    were not finite were not applied), the latest batch, and what was seen."""
    state = checkpoint.shared_tensors(t.session)
    whole = {path: v.whole() if isinstance(v, Piece) else v for path, v in state.items()}
    if t.session.ranks.rank:
        return
    clock = t.session.clock
    folder = unused_name(t.folder / f"nan-{clock.images:09}")
    folder.mkdir(parents=True)
    clock.seek(clock.images - clock.batch)
    t.pipeline.ready(clock)
    batch = t.pipeline.batch(clock)
    clock.advance()
    tensors = {f"state/{path}": v for path, v in whole.items()}
    tensors |= {"batch/images": batch.images_NCHW, "batch/positions": batch.position_N}
    host = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    safetensors.torch.save_file(host, folder / "state.safetensors")
    facts = {"player": failure.player, "what": failure.what, "images": clock.images}
    counts = {f"{player}/{what}": n for (player, what), n in failure.counts.items()}
    facts |= {"updates": counts, "message": str(failure)}
    (folder / "nan.json").write_text(json.dumps(facts, indent=1))
    t.display.warn(f"wrote {folder} to look into the non-finite {failure.what}")
    if t.record and t.snapshots:
        t.record.event(clock.images, "nan", str(failure))
        t.snapshots.write_report()


def roll_back(t: Training, failure: NonFinite) -> None:
    """Go on from the newest whole checkpoint with a fresh noise stream, or raise the failure."""
    session = t.session
    salt = session.salt + 1
    newest = None
    t.saver.wait()
    if session.ranks.rank == 0:
        newest = checkpoint.newest_whole(t.checkpoints, t.display.warn, set_aside=True)
    newest = session.ranks.share(newest)
    if session.recipe.on_nan == "stop" or newest is None or salt > ROLLBACKS:
        raise failure
    t.iterate.forget()
    checkpoint.restore(session, Loaded(newest, session.ranks.rank))
    session.change_noise(salt)
    for player in session.players.values():
        player.bad_losses.zero_()
        player.bad_gradients.zero_()
    t.stats.read()
    images = session.clock.images
    text = f"back to {images:,} images with new noise ({salt} of {ROLLBACKS})"
    t.display.warn(text)
    if t.record:
        t.record.go_back(images)
        if t.metrics:
            t.metrics.go_back(images)
        t.record.event(images, "rollback", f"{failure}; {text}")
