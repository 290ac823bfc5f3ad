"""The parts of a recipe: frozen dataclasses that tyro overrides and JSON stores."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from torch import Tensor, nn

from engine.networks.spec import Network
from engine.translation import Direction, Translation
from kernels import dispatch
from pipelines.settings import Data

if TYPE_CHECKING:
    from engine.player import Player
    from pipelines.batch import Batch

Networks = dict[str, nn.Module]  # a player's network by the player's name
Values = dict[str, Tensor]  # named 0-d device tensors

Parallel = Literal["auto", "ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"]

Inline = tyro.conf.arg(name="")  # the part's fields become flags without the part's own prefix


@dataclass(frozen=True)
class Optimizer:
    """What moves a player's parameters; the learning rate may warm up and decay, in images."""

    lr: float = 2e-4
    """Learning rate."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_kimg: float = 0.0
    """Thousands of images over which the learning rate rises linearly from zero."""
    decay_kimg: float = 0.0
    """Thousands of images, at the end of the run, over which it falls linearly to zero; at most
    the run's second half."""


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015)."""

    betas: tuple[float, float] = (0.5, 0.999)
    """Decay rates of the first and second moments."""


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012), without momentum."""

    lr: float = 5e-5
    """Learning rate."""
    alpha: float = 0.99
    """Decay rate of the second moment."""


@dataclass(frozen=True)
class PlayerSettings:
    """The networks that one optimizer updates together."""

    network: Annotated[Network, Inline]
    optimizer: Annotated[Optimizer, Inline] = Adam()
    spectral_norm: bool = False
    """Divide the weights of every layer by their largest singular value (Miyato et al. 2018)."""
    ema_kimg: float = 0.0
    """Half-life of the moving average of the weights, in thousands of images; 0 keeps none."""
    clip: float = 0.0
    """Largest norm of the player's gradient; 0 does not clip."""


@dataclass(frozen=True)
class Length:
    """Length of the run; exactly one is given."""

    kimg: float | None = None
    """In thousands of images."""
    epochs: float | None = None
    """In passes over the dataset."""
    steps: int | None = None
    """In iterations."""


@dataclass(frozen=True)
class Outputs:
    """When a run writes what, in thousands of images. May change on resume."""

    log_every: float = 2.0
    """Statistics, and the terminal's figures."""
    sample_every: float = 50.0
    """Sample grid, held-out evaluation and report."""
    samples: int = 64
    """Images in a sample grid."""
    checkpoint_every: float = 50.0
    """Checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: float = 0.0
    """Checkpoints at multiples of this many thousand images are kept for good; 0 keeps none."""
    track: tuple[str, ...] = ()
    """Trackers beside TensorBoard, which is always on: aim, clearml, comet_ml, dvclive, mlflow,
    swanlab, trackio, wandb."""


@dataclass(frozen=True)
class Metrics:
    """How the samples are measured, while training and by `engine.evaluate`. May change on resume:
    it never changes what is trained."""

    every_kimg: float = 0.0
    """Measure each time so many thousand images were seen, and at the end; 0 never does while
    training."""
    generated: int = 10_000
    """Images generated for a figure."""
    real: int = 10_000
    """Real images that they are compared with, at most; 0 takes the whole split."""
    split: Literal["train", "test"] = "train"
    """Which real images: those that were trained on, or held-out ones."""
    extractor: Literal["auto", "inception", "classifier"] = "auto"
    """What makes features: inception (fetched by the library), a small classifier trained on the
    labelled dataset once; auto takes Inception where its weights are here, else the classifier."""
    weights: Path | None = None
    """Weights of the extractor: Inception's (.pth), TorchScript (.pt), or .safetensors."""
    network: str | None = None
    """Class that the .safetensors weights are for, MODULE:CLASS; built without arguments, called
    with uint8 images (N, 3, H, W), it gives features (N, D), or features and logits."""
    seed: int = 0
    """Seed of the latents that are measured."""
    lpips: bool = False
    """LPIPS too, where images come in pairs (the library fetches AlexNet)."""


NO_LATENTS = (
    "this recipe's model makes no images from latent vectors; where it makes them from images, "
    "python -m engine.translate RUN_DIR INPUT... --out DIR does"
)
NEEDS_CAPTION = (
    "this recipe's model draws what a caption says: python -m engine.sample RUN_DIR --caption "
    "'TEXT' does"
)
NO_TRANSLATION = "this recipe's model does not translate images"


@dataclass(frozen=True)
class Algorithm:
    """A training algorithm: its players, and how one iteration updates them.

    A subclass, one per file of `engine/steps/`, has one PlayerSettings field per player, in the
    order in which they are built. What a family cannot do raises ValueError saying so.
    """

    def players(self) -> dict[str, PlayerSettings]:
        """Settings of each player by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, PlayerSettings)}

    def begin(self, networks: "Networks") -> None:
        """Give fresh networks of a run, still on the host, those weights for which a setting names
        a source. Raises ValueError naming it."""

    def start(self, players: "dict[str, Player]", key: Tensor) -> "Callable[[Batch], Values]":
        """The step of a run: a callable that performs one iteration on a batch and returns named
        0-d device tensors. `key` is the run's noise key (see `kernels.philox`)."""
        raise NotImplementedError

    def period(self) -> int:
        """Iterations after which the pattern of updates repeats (penalties of some iterations
        only)."""
        return 1

    def settles(self) -> int:
        """The iteration from which on that is so."""
        return 0

    def turns(self, iteration: int) -> Hashable:
        """Which of its updates an iteration makes: iterations of equal turns give the device the
        same work, whatever else the clock says."""
        return ()

    def kinds(self) -> tuple[int, ...]:
        """Iterations that together show all that is computed."""
        return tuple(range(min(self.period(), 2)))

    def reduced(self) -> int:
        """Bytes that a rank gives into the step's own sum over ranks in an iteration; gradients and
        norms not counted. 0 where it takes none."""
        return 0

    def gathered(self, data: Data) -> int:
        """Bytes of each image that its rank gives to all others in an iteration."""
        return 0

    def talks(self) -> bool:
        """Whether a loss function itself takes something of other ranks; where there are several,
        such a one is not compiled."""
        return False

    def second_order(self) -> bool:
        """Whether a loss holds a gradient of a network (a penalty)."""
        return False

    def settled(self) -> "Algorithm":
        """The same with what a file or a run that its settings name says of sizes and content.
        Raises ValueError naming the flag."""
        return self

    def check(self) -> None:
        """Raise ValueError, naming flag and remedy, for values that cannot be trained with."""

    def check_words(self, words: tuple[str, ...]) -> None:
        """Raise ValueError, naming flag and remedy, for a vocabulary that is not the right one."""

    def classes(self) -> int:
        """Classes that the sampler is given: by the largest of the last so many numbers of the
        latent vector. 0 where it is given none."""
        return 0

    def told(self) -> dict[str, int]:
        """The dataset's classes by each player whose network is given them."""
        counts = {name: player.network.classes for name, player in self.players().items()}
        return {name: count for name, count in counts.items() if count}

    def reads_captions(self) -> bool:
        """Whether it is trained on captions."""
        return any(player.network.words for player in self.players().values())

    def check_data(self, data: Data) -> None:
        """Raise ValueError, naming flag and remedy, for data that it cannot be trained on."""

    def uses(self) -> dict[str, str]:
        """What a trained run is good for, and the command with RUN_DIR in the run's place."""
        found, kind = {}, type(self)
        if self.draws_captions():
            found["sample"] = "python -m engine.sample RUN_DIR --caption 'TEXT'"
        elif kind.latent_dim is not Algorithm.latent_dim:
            found["sample"] = "python -m engine.sample RUN_DIR --num 64 --out grid.png"
        for verb, more in (
            ("translate", ""),
            ("stylise", "--style IMAGE "),
            ("repair", "--mask MASK "),
        ):
            if getattr(kind, verb) is not getattr(Algorithm, verb):
                found[verb] = f"python -m engine.translate RUN_DIR IMAGES... {more}--out FOLDER"
        if kind.reconstruct is not Algorithm.reconstruct:
            found["reconstruct"] = "python -m engine.sample RUN_DIR --reconstruct"
        return found

    def latent_dim(self) -> int:
        """Length of the latent vector."""
        raise ValueError(NO_LATENTS)

    def sampler(self, networks: "Networks") -> nn.Module:
        """What makes images (N, C, H, W), float32 in [-1, 1], from latent vectors (N, L), in the
        mode that the networks are in; it shares their weights."""
        raise ValueError(NEEDS_CAPTION if self.draws_captions() else NO_LATENTS)

    def sampler_settings(self) -> Network:
        """Sizes whose `build` gives the module that `sampler` does, for whoever has only its
        weights."""
        raise ValueError(NO_LATENTS)

    def decode(self, networks: "Networks", z_NL: Tensor) -> Tensor:
        """Images (N C H W in [-1, 1]) from latent vectors, by networks in eval mode."""
        return self.sampler(networks)(z_NL).float()

    def draws_captions(self) -> bool:
        """Whether `captioned` makes images."""
        return type(self).captioned is not Algorithm.captioned

    def captioned(
        self, networks: "Networks", z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> Tensor:
        """Images (N, C, H, W), float32 in [-1, 1], of captions (see `Batch`) and latent vectors,
        by networks in eval mode."""
        raise ValueError("this recipe's model draws no captions")

    def attended(
        self, networks: "Networks", z_NL: Tensor, tokens_NL: Tensor, lengths_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those images, and what of each word went where in them: (N, words, h, w), of any scale,
        0 after the last word."""
        raise ValueError("--attention: this recipe's model has no map of where each word goes")

    def notes(self) -> tuple[str, ...]:
        """What a run says of it at its start: what it takes in place of what it was not given."""
        return ()

    def translation(self, data: Data) -> Translation:
        """How `translate`, or `repair`, takes images."""
        raise ValueError(NO_TRANSLATION)

    def translate(self, networks: "Networks", images_NCHW: Tensor, direction: Direction) -> Tensor:
        """Images of the other domain or of the larger size, float32 in [-1, 1]."""
        raise ValueError(NO_TRANSLATION)

    def translator(self, networks: "Networks", data: Data, direction: Direction) -> nn.Module:
        """What makes the images that `translate` does of images alone, in the mode that the
        networks are in; it shares their weights. Its settings say if it takes any size."""
        raise ValueError(NO_TRANSLATION)

    def translator_settings(self, direction: Direction) -> Network:
        """Sizes whose `build` gives the module that `translator` does, for whoever has only its
        weights."""
        raise ValueError(NO_TRANSLATION)

    def stylise(
        self, networks: "Networks", images_NCHW: Tensor, style_NCHW: Tensor, alpha: float
    ) -> Tensor:
        """Images in the style of others, (1 or N, C, any H, any W), float32 in [-1, 1]; alpha: how
        much so, from 0 to 1."""
        raise ValueError("this recipe's model takes no style")

    def repair(self, networks: "Networks", images_NCHW: Tensor, hole_N1HW: Tensor) -> Tensor:
        """Images, float32 in [-1, 1], whose holes (bool) are filled; elsewhere they stay as they
        are. `translation` says how it takes them."""
        raise ValueError("this recipe's model does not repair images")

    def columns(self, networks: "Networks", batch: "Batch") -> tuple[Tensor, ...]:
        """What stands side by side in a picture of what the model makes of held-out images: each
        (N, C, H, W) in [-1, 1], by networks in eval mode."""
        raise ValueError("this recipe's model makes nothing of given images")

    def reconstruct(self, networks: "Networks", images_NCHW: Tensor) -> Tensor:
        """What the model makes of given images (N C H W in [-1, 1])."""
        raise ValueError("this recipe's model does not reconstruct images")

    def remade(self, networks: "Networks", batch: "Batch") -> tuple[Tensor, Tensor]:
        """What the model makes of a held-out batch, and what that should be: (N, C, H, W) each, in
        [-1, 1]."""
        return self.reconstruct(networks, batch.images_NCHW), batch.images_NCHW

    def trivial(self, batch: "Batch") -> dict[str, Tensor]:
        """By name, what one would have in place of `remade` without a model."""
        return {}

    def held_out(self, networks: "Networks", batch: "Batch", key: Tensor) -> "Values":
        """Named figures per image (N,) on a held-out batch; empty where the family has none."""
        return {}

    def summarise(
        self, values: "Values", labels_N: Tensor | None, without: tuple[int, ...] = ()
    ) -> dict[str, float]:
        """Figures of a held-out set from what `held_out` gave for all of its images, (N,) float64
        by name on the host, and their classes; here the means. without: classes that were left out
        of training."""
        return {name: float(value_N.mean()) for name, value_N in values.items()}


@dataclass(frozen=True)
class Recipe:
    """The whole definition of a run."""

    step: Annotated[Algorithm, Inline]
    data: Data = Data()
    length: Annotated[Length, Inline] = Length(kimg=1000)
    outputs: Annotated[Outputs, Inline] = Outputs()
    metrics: Metrics = Metrics()
    seed: int = 0
    """Seed of the weights, the data order and all noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto takes bf16 where the hardware has it, fp16 (scaled) is for GPUs."""
    compile: Literal["auto", "off", "required"] = "auto"
    """torch.compile of the loss functions; auto says in one line where it runs eager and why."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Order of images and convolutions' weights; auto is channels_last, or what the probe finds
    faster."""
    convolutions: Literal["auto", "library", "matmul"] = "auto"
    """How convolutions and their gradients are computed: by the library, or as products of
    matrices; auto is the library, or on a CPU, for each of them, what the probe finds faster."""
    probe: Literal["auto", "off"] = "auto"
    """Before a run that is long enough, measure what is left to auto (memory format, convolutions,
    compiled or eager, kernels on a GPU) and keep what was found for the whole run."""
    graph: Literal["off", "on"] = "off"
    """On a GPU, replay whole iterations as captured CUDA graphs, one for each set of updates. What
    is computed stays the same."""
    kernels: dispatch.Setting = "auto"
    """Triton's fused operations: auto where a bench has shown a gain, fused wherever they serve,
    reference never (plain PyTorch)."""
    parallel: Parallel = "auto"
    """How several ranks share a player: ddp (everything everywhere), fsdp2 or DeepSpeed's ZeRO
    (stage 1: optimizer state, 2: gradients too, 3: parameters too are spread over the ranks); auto
    is ddp, or what accelerate's configuration says. May change on resume."""
    accumulate: int = 1
    """Micro-batches per update; gradients are reduced over ranks once per update."""
    batch_per_rank: int | Literal["auto"] | None = None
    """Images of a rank's micro-batch, in place of --accumulate; auto takes as many as the free
    memory has room for, or fewer where that is measured to be faster, where no BatchNorm sees them.
    May change on resume."""
    sync_bn: Literal["auto", "on", "off"] = "auto"
    """BatchNorm statistics over the batch of all ranks in place of each rank's own; auto does so
    where a rank has fewer than 16 images."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """At a non-finite loss or gradient: stop, or go on from the last good checkpoint with new
    noise (at most 3 times)."""
    hang_after: float = 600.0
    """Seconds without progress after which several ranks name the one that hangs and leave, to be
    started again by their launcher; 0 never. Compiling, measuring and saving have 25 minutes."""
