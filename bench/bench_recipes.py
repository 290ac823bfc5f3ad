"""Every adversarial and variational recipe beside its plain form (plain.py, plain_translation.py,
plain_text.py, plain_vae.py): plain, ours eager, compiled and, on a GPU, captured as CUDA graphs.

    pytest bench/bench_recipes.py --benchmark-only

A round is one period of each of them, which so take turns: all of the critic's updates and
the generator's, from where their pattern repeats on; of Progressive GAN at its last level. Each row
gives images/s and the ratio to plain in the same run; compilation is excluded. Ours keeps the
recipe's moving average and guards against non-finite values, plain does neither.

On a GPU the sizes are the recipe's own. On a CPU the batch is halved, down to 16, and then all
widths, until a period takes at most 64 GFLOPs (half widths taking a quarter).
"""

import gc
import math
import statistics
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from bench.brief import params
from bench.iterating import iterating, on_own_stream
from bench.plain import PlainGAN, normalised
from bench.plain_text import PlainText, Reader
from bench.plain_translation import PlainCycle, PlainEnlarging, PlainPaired
from bench.plain_vae import PlainVAE
from bench.side_by_side import Turns, note, timed
from engine import recipe, session, world
from engine.compile import Compiler, missing_toolchain
from engine.describe import cost
from engine.networks.point import FromPoint, ToPoint
from engine.precision import choose_precision
from engine.settings import Optimizer, PlayerSettings, Recipe, RMSprop
from engine.steps.adversarial import Adversarial
from engine.steps.autoencoder import Variational
from engine.steps.cycle import Cycle
from engine.steps.paired import Paired
from engine.steps.progressive import Progressive
from engine.steps.super_resolution import SuperResolution
from engine.steps.text_to_image import TextToImage
from pipelines.batch import Batch
from pipelines.captions import LENGTH

WARM_UP, ROUNDS = 1, 5
FEWEST, MOST_FLOPS = 16, 64e9
CLASSES = 150  # of birds to train on: few images of a batch share theirs
WIDTHS = ("width", "widths", "base", "channels", "hidden")
FAMILIES = (Adversarial, Progressive, Cycle, Paired, SuperResolution, TextToImage, Variational)
ALL = {name: recipe.load(name) for name in recipe.names()}
BRIEF = ("dcgan_mnist", "wgan_gp_cifar10")
"""Without and with a gradient penalty; --all takes every recipe."""
NAMES = [name for name, r in ALL.items() if isinstance(r.step, FAMILIES)]


def halved(given: Recipe) -> Recipe:
    """The recipe with networks half as wide."""
    players = {name: narrow(player) for name, player in given.step.players().items()}
    return replace(given, step=replace(given.step, **players))


def narrow(player: PlayerSettings) -> PlayerSettings:
    sizes = {f.name: getattr(player.network, f.name) for f in fields(player.network)}
    sizes = {name: value for name, value in sizes.items() if name in WIDTHS}
    for name, value in sizes.items():
        sizes[name] = tuple(v // 2 for v in value) if isinstance(value, tuple) else value // 2
    return replace(player, network=replace(player.network, **sizes))


def sized(given: Recipe, device: torch.device) -> tuple[Recipe, int]:
    """The recipe as it is measured on a device, and by what its widths were divided."""
    if device.type != "cpu":
        return given, 1
    flops, divided = cost(given).flops_per_image * given.step.period(), 1
    while True:
        batch = given.data.batch
        while batch > FEWEST and flops * batch > MOST_FLOPS:
            batch //= 2
        if flops * batch <= MOST_FLOPS:
            return replace(given, data=replace(given.data, batch=batch)), divided
        given, divided, flops = halved(given), divided * 2, flops / 4


class Top(nn.Module):
    """A growing network at its last level, where that is wholly there."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("alpha", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.network.top, self.alpha)


def by_the_library(module: nn.Module) -> None:
    """Have a convolution of ours computed as torch computes it."""
    if isinstance(module, FromPoint | ToPoint):
        module.__class__ = nn.ConvTranspose2d if isinstance(module, FromPoint) else nn.Conv2d


def plain_optimizer(settings: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    if isinstance(settings, RMSprop):
        alpha = settings.alpha
        return torch.optim.RMSprop(network.parameters(), settings.lr, alpha, settings.eps)
    return torch.optim.Adam(network.parameters(), settings.lr, settings.betas, settings.eps)


Plain = PlainGAN | PlainCycle | PlainPaired | PlainEnlarging | PlainText | PlainVAE


def plain_of(given: Recipe, device: torch.device) -> Plain:
    """The plain form of a recipe, with the parameters that its session begins with."""
    step, made = given.step, {}
    players = step.players()
    bare = {name: replace(player, spectral_norm=False) for name, player in players.items()}
    bare = replace(given, step=replace(step, **bare))
    for name, network in session.build_networks(bare).items():
        network = network.apply(by_the_library)
        network = Top(network) if isinstance(step, Progressive) else network
        network = normalised(network) if players[name].spectral_norm else network
        made[name] = network.to(device).train()
        optimizer = players[name].optimizer
        made[f"optimizer_{name[0]}"] = plain_optimizer(optimizer, made[name])
    if isinstance(step, Cycle):
        return PlainCycle(**made, cycle=step.cycle, identity=step.identity)
    if isinstance(step, Paired):
        return PlainPaired(**made, l1=step.l1, reverse=step.direction == "BtoA")
    if isinstance(step, SuperResolution):
        return PlainEnlarging(
            **made, weights=(step.perceptual, step.pixel_weight(), step.adversarial)
        )
    if isinstance(step, TextToImage):
        return plain_text(step, made)
    if isinstance(step, Variational):
        return PlainVAE(**made, pixels=step.pixels, beta=step.beta)
    latent = players["generator"].network.latent
    if isinstance(step, Progressive):
        return PlainGAN(
            **made,
            **{"loss": "wasserstein", "latent": latent, "reuse": False, "freeze": False},
            gp=step.gp,
            drift=step.drift,
        )
    return PlainGAN(
        **made,
        loss=step.loss,
        latent=latent,
        reuse=step.loss in ("nonsaturating", "least-squares"),
        freeze=step.loss == "wasserstein",
        critic_updates=step.critic_updates,
        clip=step.clip_weights,
        gp=step.gp,
        r1=step.r1,
        r1_every=step.r1_every,
    )


def plain_text(step: TextToImage, made: dict[str, nn.Module]) -> PlainText:
    """That of AttnGAN, of its networks."""
    judges, encoders = made["discriminators"], made["encoders"]
    device = next(encoders.parameters()).device
    reader, settings = Reader(encoders.text).to(device), step.encoders.optimizer
    learning = [p for part in (reader, encoders.image) for p in part.parameters()]
    return PlainText(
        made["generator"],
        judges,
        reader,
        encoders.image,
        made["optimizer_g"],
        [plain_optimizer(step.discriminators.optimizer, judge) for judge in judges.of_size],
        torch.optim.Adam(
            [p for p in learning if p.requires_grad], settings.lr, settings.betas, settings.eps
        ),
        matching=step.matching,
        clip=step.encoders.clip,
        latent=step.latent_dim(),
    )


def captions_batch(given: Recipe, device: torch.device) -> tuple[Tensor, ...]:
    """Captions of noise, int64, and their lengths, for a model that reads any."""
    if not given.step.reads_captions():
        return ()
    generator, count = torch.Generator().manual_seed(1), given.data.batch
    words = given.step.encoders.network.words
    tokens_NL = torch.randint(1, words, (count, LENGTH), generator=generator)
    lengths_N = torch.randint(1, LENGTH + 1, (count,), generator=generator)
    tokens_NL *= torch.arange(LENGTH) < lengths_N[:, None]
    return tokens_NL.to(device), lengths_N.to(device)


def noise_batch(given: Recipe, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images of noise in [-1, 1], contiguous, a class for each, and a partner, the
    smaller one where the recipe enlarges."""
    data, generator = given.data, torch.Generator().manual_seed(0)
    shape = (data.batch, data.channels, data.resolution, data.resolution)
    real_NCHW = torch.rand(shape, generator=generator) * 2 - 1
    classes = CLASSES if given.step.reads_captions() else max(given.step.classes(), 1)
    label_N = torch.randint(classes, shape[:1], generator=generator)
    sides = [side // (data.scale or 1) for side in shape[2:]]
    pair_NCHW = torch.rand((*shape[:2], *sides), generator=generator) * 2 - 1
    return real_NCHW.to(device), label_N.to(device), pair_NCHW.to(device)


def seen_by_plain(given: Recipe, device: torch.device) -> tuple[Tensor, ...]:
    """What of such a batch an iteration of the plain form takes."""
    real_NCHW, label_N, pair_NCHW = noise_batch(given, device)
    if isinstance(given.step, Cycle | Paired):
        return real_NCHW, pair_NCHW
    if isinstance(given.step, SuperResolution):
        return pair_NCHW, real_NCHW
    if isinstance(given.step, TextToImage):
        return real_NCHW, label_N, *captions_batch(given, device)
    return (real_NCHW, label_N) if given.step.classes() else (real_NCHW,)


def plain(given: Recipe, device: torch.device):
    """A period of the plain form."""
    baseline, seen = plain_of(given, device), seen_by_plain(given, device)
    updates = given.step.updates[-1] if isinstance(given.step, Progressive) else 1
    parts = list(zip(*(t.chunk(updates) for t in seen), strict=True))

    def period():
        for _ in range(given.step.period()):
            for part in parts:
                baseline.iteration(*part)

    return period


def ours(given: Recipe, device: torch.device, compiled: bool, captured: bool = False):
    """A period of the session that a run would have."""
    on_own_stream(device, captured)
    ranks, precision = world.Ranks(0, 0, 1, device), choose_precision("auto", device)
    live = session.start(given, ranks, precision, Compiler(compiled, "bench", True), 10**9)
    live.clock.seek(given.step.settles() * given.data.batch)
    real_NCHW, label_N, pair_NCHW = noise_batch(given, device)
    real_NCHW, pair_NCHW = (
        t.contiguous(memory_format=torch.channels_last) for t in (real_NCHW, pair_NCHW)
    )
    where, said = live.clock.position_N(), captions_batch(given, device)
    iterate = iterating(live, Batch(real_NCHW, label_N, where, pair_NCHW, *said), captured)

    def period():
        for _ in range(given.step.period()):
            iterate()

    return period


@pytest.fixture(scope="module")
def ratios():
    """Of each recipe that was measured, by variant."""
    return {}


@pytest.mark.parametrize("name", params(NAMES, BRIEF))
def bench_recipe(benchmark, ratios, device, row, name):
    given, divided = sized(ALL[name], device)
    made = {"plain": plain(given, device), "eager": ours(given, device, False)}
    if device.type == "cuda" or not missing_toolchain():
        made["compiled"] = ours(given, device, True)
    if device.type == "cuda":
        made["captured"] = ours(given, device, True, captured=True)
    seconds = {variant: [] for variant in made}

    def turn():
        for variant, run in made.items():
            seconds[variant].append(timed(run, device))

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=WARM_UP)
    turns = Turns("plain", {variant: s[WARM_UP:] for variant, s in seconds.items()})
    ratios[name] = {v: turns.ratio(v) for v in made if v != "plain"}
    images = given.data.batch * given.step.period()
    speeds = {f"{variant}_images_per_s": images / turns.median(variant) for variant in made}
    note(
        benchmark, *(turns.beside(v, speeds[f"{v}_images_per_s"], "images/s") for v in ratios[name])
    )
    facts = {"batch": given.data.batch, "widths_divided_by": divided, **speeds}
    benchmark.extra_info |= facts | {f"{v}_ratio": r for v, r in ratios[name].items()}
    said = "".join(
        f"   {v} {speeds[f'{v}_images_per_s']:8.1f} {ratio:5.2f}x"
        for v, ratio in ratios[name].items()
    )
    size = f"batch {given.data.batch}, widths / {divided}"
    row(f"{name:16} {size:23} plain {speeds['plain_images_per_s']:8.1f} images/s{said}")
    made.clear()
    torch._dynamo.reset()  # it limits how many graphs all recipes together may have
    gc.collect()


def bench_mean(benchmark, ratios, row):
    """Over all of the recipes that were measured before it."""
    if not ratios:
        pytest.skip("no recipe was measured")
    found = benchmark.pedantic(summary, (ratios,), rounds=1)
    benchmark.extra_info |= found
    for variant in next(iter(ratios.values())):
        named = {k.removeprefix(f"{variant}_"): v for k, v in found.items() if variant in k}
        row(
            f"{variant:9} "
            + "   ".join(f"{k.replace('_', ' ')} {v:.2f}x" for k, v in named.items())
        )


def summary(ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    """Geometric mean and smallest ratio of each variant, and the smallest among those recipes that
    have the gradient penalty."""
    found = {}
    for variant in next(iter(ratios.values())):
        values = {name: r[variant] for name, r in ratios.items()}
        penalised = [v for name, v in values.items() if getattr(ALL[name].step, "gp", 0) > 0]
        found[f"{variant}_geometric_mean"] = math.exp(
            statistics.mean(map(math.log, values.values()))
        )
        found[f"{variant}_smallest"] = min(values.values())
        if penalised:
            found[f"{variant}_smallest_with_gradient_penalty"] = min(penalised)
    return found
