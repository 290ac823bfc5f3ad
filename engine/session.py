"""The live objects of a run, built from its recipe: networks, players, step, clock, noise key."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.algorithm import Networks, Values
from engine.compile import Compiler
from engine.networks.spectral import spectral_norm
from engine.player import Player
from engine.precision import Precision
from engine.recipe import image_spec
from engine.settings import PlayerSettings, Recipe
from engine.sharing import choose_sync_bn
from engine.world import Ranks
from kernels import dispatch, philox
from kernels.batchnorm_module import fuse, synchronise
from kernels.convolution import Forms
from kernels.convolution_module import map_convolutions
from pipelines.batch import Batch, Clock


@dataclass
class Session:
    """One run on one rank."""

    recipe: Recipe
    ranks: Ranks
    clock: Clock
    key: Tensor
    players: dict[str, Player]
    step: Callable[[Batch], Values]
    salt: int = 0  # rises with each rollback, for a fresh stream of noise

    def change_noise(self, salt: int) -> None:
        """Go over to the noise streams of another salt."""
        self.salt = salt
        self.key.copy_(philox.make_key(self.recipe.seed, salt))

    def samplers(self) -> Networks:
        """The networks to show and measure, in the mode they are in."""
        return {name: player.sampler for name, player in self.players.items()}

    def rehearse(self, batch: Batch) -> None:
        """Every kind of iteration once, on one batch; the clock stays."""
        began = self.clock.images
        for iteration in self.recipe.step.kinds():
            self.clock.seek(iteration * self.clock.batch)
            self.step(batch)
        self.clock.seek(began)

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that a step changes besides parameters and optimizer state."""
        return [b for p in self.players.values() for b in p.network.buffers()]

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Steps inside compute everything but reduce no gradient and update nothing; what else they
        change is put back."""
        saved = [tensor.clone() for tensor in self.state_tensors()]
        for player in self.players.values():
            player.rehearsing = True
        try:
            yield
        finally:
            for player in self.players.values():
                player.rehearsing = False
            with torch.no_grad():
                for tensor, before in zip(self.state_tensors(), saved, strict=True):
                    tensor.copy_(before)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Have the networks to show whole on every rank; all ranks enter."""
        with ExitStack() as stack:
            for player in self.players.values():
                stack.enter_context(player.gathered())
            yield


def build_networks(recipe: Recipe, classes: int = 0) -> Networks:
    """Each player's network with fresh parameters, the same for a seed on every device and rank."""
    networks: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for i, (name, settings) in enumerate(recipe.step.players().items()):
            torch.manual_seed(recipe.seed * 1000 + i)
            network = settings.network.build(image_spec(recipe, classes))
            networks[name] = spectral_norm(network) if settings.spectral_norm else network
    return networks


def start(
    recipe: Recipe,
    ranks: Ranks,
    precision: Precision,
    compiler: Compiler,
    total_images: int,
    classes: int = 0,
    products: Mapping[str, Mapping[str, Forms]] | None = None,
) -> Session:
    """Build everything of a run but its pipeline. Raises ValueError for sizes that do not fit.

    products: by player and layer, the maps of convolutions that are matrix products if the recipe
    has such; None: all.
    """
    dispatch.use(recipe.kernels)
    clock = Clock(recipe.data.batch, ranks.device, rank=ranks.rank, world_size=ranks.world_size)
    key = philox.make_key(recipe.seed, device=ranks.device)
    players: dict[str, Player] = {}
    settings: dict[str, PlayerSettings] = recipe.step.players()
    networks = build_networks(recipe, classes)
    recipe.step.begin(networks)
    for name, network in networks.items():
        if dispatch.choose("batchnorm_leaky_relu", ranks.device).fused:
            network = fuse(network)
        if choose_sync_bn(recipe, ranks.world_size)[0]:
            network = synchronise(network)
        if recipe.convolutions == "matmul":
            network = map_convolutions(network, products and products.get(name, {}))
        players[name] = Player(
            name,
            settings[name],
            network.to(ranks.device).train(),
            ranks=ranks,
            parallel=recipe.parallel,
            clock=clock,
            precision=precision,
            compiler=compiler,
            accumulate=recipe.accumulate,
            total_images=total_images,
            planar=recipe.memory_format == "contiguous",
        )
    step = recipe.step.start(players, key)
    if recipe.memory_format == "contiguous":
        step = _of_planar(step)
    return Session(recipe, ranks, clock, key, players, step)


def _of_planar(step: Callable[[Batch], Values]) -> Callable[[Batch], Values]:
    """The step, given images channel by channel: convolutions take the order of what they are
    given, whatever that of their weights."""

    def planar(batch: Batch) -> Values:
        pair_NCHW = None if batch.pair_NCHW is None else batch.pair_NCHW.contiguous()
        images_NCHW = batch.images_NCHW.contiguous()
        return step(replace(batch, images_NCHW=images_NCHW, pair_NCHW=pair_NCHW))

    return planar
