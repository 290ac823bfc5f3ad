"""The parts of a recipe: frozen dataclasses that tyro overrides and JSON stores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.algorithm import Algorithm
from engine.player_settings import Adam as Adam
from engine.player_settings import Inline
from engine.player_settings import Optimizer as Optimizer
from engine.player_settings import PlayerSettings as PlayerSettings
from engine.player_settings import RMSprop as RMSprop
from kernels import dispatch
from pipelines.settings import Data

Parallel = Literal["auto", "ddp", "fsdp2", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"]


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
