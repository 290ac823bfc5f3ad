"""VQ-VAE: sizes, codes, loss and codebook against loops by hand; ranks, figures, bad input."""

import copy
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from engine import session
from engine.codebook import absorb, codebook_statistics, perplexity
from engine.compile import Compiler
from engine.describe import parameters
from engine.metrics.compared import ComparedEvaluator
from engine.metrics.open import open_evaluator
from engine.networks.spec import ImageSpec
from engine.networks.vqvae import Codebook, VectorQuantised
from engine.recipe import load
from engine.session import build_networks
from engine.steps.quantised import quantised_update
from engine.train import main
from kernels import philox
from pipelines.batch import Batch
from tests.players import FP32, RANKS
from tests.runs import toy

KEY = philox.make_key(5)
K, D = 7, 3
SMALL = VectorQuantised(width=6, halvings=2, blocks=1, codes=K, length=D)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def filled(book: Codebook) -> Codebook:
    """With vectors that lie far apart."""
    book.vectors_KD.copy_(random(*book.vectors_KD.shape, seed=1))
    book.sums_KD.copy_(book.vectors_KD)
    return book


def small_network() -> nn.Module:
    """Whose vectors, 0.5 apart or so, have several codes."""
    torch.manual_seed(0)
    network = SMALL.build(ImageSpec(3, 16))
    with torch.no_grad():
        network.encoder[-1].weight *= 10
    filled(network.codebook)
    return network


def test_sizes_are_those_of_the_paper():
    network = load("vqvae_birds").step.autoencoder.network.build(ImageSpec(3, 64))
    strided = (3 * 256 * 16 + 256) + (256 * 256 * 16 + 256)
    block = (256 * 256 * 9 + 256) + (256 * 256 + 256)
    assert parameters(network.encoder) == strided + 2 * block + (256 * 64 + 64)
    mirrored = (256 * 256 * 16 + 256) + (256 * 3 * 16 + 3)
    assert parameters(network.decoder) == (64 * 256 + 256) + 2 * block + mirrored
    assert parameters(network) == 4_779_075  # none of them the codebook's
    assert sum(b.numel() for b in network.buffers()) == 2 * 512 * 64 + 512


def test_images_become_codes_and_codes_images():
    network, images_NCHW = small_network(), random(2, 3, 16, 24)
    code_Nhw = network.encode(images_NCHW)
    assert code_Nhw.shape == (2, 4, 6) and code_Nhw.dtype == torch.int64
    made_NCHW = network.decode(code_Nhw)
    assert made_NCHW.shape == images_NCHW.shape and made_NCHW.abs().max() <= 1
    step = load("vqvae_birds").step
    assert torch.equal(step.reconstruct({"autoencoder": network}, images_NCHW), made_NCHW)


def nearest_by_hand(vectors_KD: Tensor, z_NDhw: Tensor) -> Tensor:
    count, _, height, width = z_NDhw.shape
    code_Nhw = torch.zeros(count, height, width, dtype=torch.int64)
    for n, y, x in product(range(count), range(height), range(width)):
        apart_KD = vectors_KD.double() - z_NDhw[n, :, y, x].double()
        code_Nhw[n, y, x] = apart_KD.square().sum(1).argmin()
    return code_Nhw


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_code_is_the_nearest(precision):
    """Also of vectors that 16 bits do not tell apart."""
    book, z_NDhw = Codebook(40, 5), 1 + 0.05 * random(3, 5, 4, 6)
    book.vectors_KD.copy_(1 + 0.05 * random(40, 5, seed=1))
    wanted_Nhw = nearest_by_hand(book.vectors_KD, z_NDhw)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        code_Nhw = book.nearest(z_NDhw)
    assert torch.equal(code_Nhw, wanted_Nhw)
    assert len(code_Nhw.unique()) > 15
    assert torch.equal(book.look_up(code_Nhw)[2, :, 3, 5], book.vectors_KD[code_Nhw[2, 3, 5]])


def test_loss_and_gradients_are_those_by_hand():
    """In float64: the decoder's gradient at e is the encoder's at z, plus that of the commitment;
    the codebook has none."""
    network, x_NCHW = small_network(), random(2, 3, 16, 16)
    loss, values = quantised_update(network, x_NCHW, commitment=0.25)
    loss.backward()

    by_hand = copy.deepcopy(network).double()
    by_hand.zero_grad()
    z_NDhw = by_hand.encoder(x_NCHW.double())
    code_Nhw = nearest_by_hand(by_hand.codebook.vectors_KD, z_NDhw)
    vectors = [[by_hand.codebook.vectors_KD[k] for k in row.flatten()] for row in code_Nhw]
    e_NDhw = torch.stack([torch.stack(row).T.unflatten(1, (4, 4)) for row in vectors])
    given_NDhw = e_NDhw.clone().requires_grad_()
    far = (by_hand.decoder(given_NDhw) - x_NCHW) ** 2
    (far.sum() / far.numel()).backward()
    apart_NDhw = z_NDhw - e_NDhw
    z_NDhw.backward(given_NDhw.grad + 0.25 * 2 * apart_NDhw.detach() / z_NDhw.numel())
    commitment = (apart_NDhw**2).sum() / z_NDhw.numel()

    assert torch.equal(values["codes"], code_Nhw) and len(code_Nhw.unique()) > 2
    assert values["commitment"].item() == pytest.approx(commitment.item(), rel=1e-5)
    wanted = far.mean() + 0.25 * commitment
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    mine = dict(network.named_parameters())
    for path, parameter in by_hand.named_parameters():
        torch.testing.assert_close(mine[path].grad.double(), parameter.grad, rtol=1e-4, atol=1e-7)
    assert not any(b.requires_grad for b in network.buffers())


def batch_of(seed: int, images: int = 4) -> tuple[Tensor, Tensor]:
    """Vectors (N, D, 2, 3) and codes of them, which leave out codes 0 and K - 1."""
    noise = torch.Generator().manual_seed(seed)
    return random(images, D, 2, 3, seed=seed), torch.randint(
        1, K - 1, (images, 2, 3), generator=noise
    )


def told(book: Codebook, seed: int, position: int = 0) -> Tensor:
    position_N = torch.arange(4) + position
    return codebook_statistics(book, *batch_of(seed), KEY, position_N, position_N[:1], 1)


def test_the_codebook_follows_as_the_formula_says(monkeypatch):
    eps = 0.1  # large enough to be seen
    monkeypatch.setattr("engine.codebook.EPS", eps)
    book, decay = filled(Codebook(K, D)), 0.9
    sizes, sums = [1.0] * K, book.vectors_KD.tolist()
    for seed in range(3):
        values = absorb(book, told(book, seed), decay, 0.0)
        z_NDhw, code_Nhw = batch_of(seed)
        z_MD, code_M = z_NDhw.permute(0, 2, 3, 1).reshape(-1, D), code_Nhw.flatten().tolist()
        counts = [code_M.count(k) for k in range(K)]
        for k in range(K):
            sizes[k] = sizes[k] * decay + counts[k] * (1 - decay)
            for d in range(D):
                near = sum(float(z[d]) for z, code in zip(z_MD, code_M, strict=True) if code == k)
                sums[k][d] = sums[k][d] * decay + near * (1 - decay)
        whole = sum(sizes)
        smooth = [(size + eps) / (whole + K * eps) * whole for size in sizes]
        wanted = [[m / n for m in row] for row, n in zip(sums, smooth, strict=True)]
        torch.testing.assert_close(book.vectors_KD, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
        share = [count / len(code_M) for count in counts if count]
        bits = -sum(p * math.log(p) for p in share)
        assert values["codebook/perplexity"].item() == pytest.approx(math.exp(bits), rel=1e-5)
        assert values["codebook/in_use"].item() == pytest.approx(len(share) / K)
        assert values["codebook/revived"].item() == 0
    assert perplexity(torch.tensor([8.0, 8, 8, 8])).item() == pytest.approx(4)


def a_vector_of(ratio_MD: Tensor) -> Tensor:
    """Whether it is as long as one of them up to a twentieth, and of its direction."""
    low_M, high_M = ratio_MD.min(1).values, ratio_MD.max(1).values
    return ((high_M - low_M < 1e-5) & (low_M > 0.95) & (high_M < 1.05)).any()


def test_dead_codes_begin_anew_at_vectors_of_the_batch():
    book, kept = filled(Codebook(K, D)), filled(Codebook(K, D))
    statistics = told(book, 0)
    values = absorb(book, statistics, 0.9, 0.95)
    absorb(kept, statistics, 0.9, 0.0)
    z_MD = batch_of(0)[0].permute(0, 2, 3, 1).reshape(-1, D)
    drawn = [bool(a_vector_of(vector / z_MD)) for vector in book.vectors_KD]
    dead = kept.sizes_K < 0.95
    assert drawn == dead.tolist() and dead[0] and dead[-1] and not dead.all()
    assert values["codebook/revived"] == dead.sum()
    assert (book.sizes_K[dead] == 0.95).all()
    torch.testing.assert_close(book.sums_KD[dead], 0.95 * book.vectors_KD[dead])
    assert torch.equal(book.sums_KD[~dead], kept.sums_KD[~dead])
    # as many as there are codes are drawn, by the batch's place alone
    assert torch.equal(told(book, 0), statistics)
    assert not torch.equal(told(book, 0, position=4)[:, -D:], statistics[:, -D:])
    rows = {tuple(row) for row in statistics[:, -D:].tolist()}
    assert len(rows) > K // 2


def test_ranks_together_find_what_one_finds():
    """To the last bit, but for the order in which vectors are added up."""
    book, position_N = Codebook(K, D), torch.arange(4) + 8
    z_NDhw, code_Nhw = batch_of(3)
    whole = codebook_statistics(book, z_NDhw, code_Nhw, KEY, position_N, position_N[:1], 1)
    halves = [
        codebook_statistics(
            book, z_NDhw[own], code_Nhw[own], KEY, position_N[own], position_N[:1], 2
        )
        for own in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-6, atol=1e-6)
    exact = [0, *range(1 + D, 1 + 2 * D)]  # counts and draws
    assert torch.equal(sum(halves)[:, exact], whole[:, exact])
    assert all(half[:, 1 + D :].any() for half in halves)  # both have drawn ones


def after_two_steps(accumulate: int) -> dict[str, Tensor]:
    recipe = replace(toy("vqvae_birds")[0], accumulate=accumulate)
    live = session.start(recipe, RANKS, FP32, Compiler(False, "test"), 100)
    side = recipe.data.resolution
    for seed in range(2):
        images_NCHW = random(8, 3, side, side, seed=seed)
        values = live.step(Batch(images_NCHW, None, live.clock.position_N()))
        assert all(value.ndim == 0 for value in values.values())
        live.clock.advance()
    return dict(live.players["autoencoder"].network.named_buffers())


def test_micro_batches_change_nothing():
    one, two = after_two_steps(1), after_two_steps(2)
    fresh = dict(build_networks(toy("vqvae_birds")[0])["autoencoder"].named_buffers())
    for name, buffer in one.items():
        torch.testing.assert_close(two[name], buffer, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(buffer, fresh[name])


def test_what_is_compiled_is_one_graph():
    network, x_NCHW = small_network(), random(2, 3, 16, 16)
    whole = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    loss, values = torch.compile(quantised_update, **whole)(network, x_NCHW, commitment=0.25)
    wanted, _ = quantised_update(network, x_NCHW, commitment=0.25)
    torch.testing.assert_close(loss, wanted)
    position_N = torch.arange(2)
    found = values["vectors"].detach(), values["codes"], KEY, position_N, position_N[:1], 1
    statistics = torch.compile(codebook_statistics, **whole)(network.codebook, *found)
    torch.testing.assert_close(statistics, codebook_statistics(network.codebook, *found))


def test_held_out_images_are_measured_beside_what_is_trivial():
    recipe = toy("vqvae_birds")[0]
    evaluator = open_evaluator(recipe, RANKS, lambda text: None)
    assert isinstance(evaluator, ComparedEvaluator)
    networks = {name: network.eval() for name, network in build_networks(recipe).items()}
    figures = evaluator.evaluate(networks, averaged=False).figures
    evaluator.close()
    kinds = ("", "_colour", "_thumbnail")
    assert {f"{name}{kind}" for name in ("psnr", "ssim") for kind in kinds} < figures.keys()
    assert figures["psnr_thumbnail"] > figures["psnr_colour"]
    codes = recipe.step.autoencoder.network.codes
    assert 1 <= figures["code_perplexity"] <= codes * figures["codes_in_use"] + 1e-6
    assert 0 < figures["reconstruction"] < 4


def test_a_thumbnail_takes_no_more_bits_than_the_codes():
    """Of 16 x 16 codes of 9 bits: 9 x 9 colours of 24 bits."""
    step, x_NCHW = load("vqvae_birds").step, random(1, 3, 64, 64)
    made = step.trivial(Batch(x_NCHW, None, torch.arange(1)))
    small_NCHW = torch.nn.functional.adaptive_avg_pool2d(x_NCHW, 9)
    wanted_NCHW = torch.nn.functional.interpolate(small_NCHW, (64, 64), mode="bicubic")
    torch.testing.assert_close(made["thumbnail"], wanted_NCHW.clamp(-1, 1))
    assert 9 * 9 * 24 <= 16 * 16 * 9 < 10 * 10 * 24
    torch.testing.assert_close(made["colour"][0, :, 5, 7], x_NCHW[0].mean((1, 2)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.resolution", "66"], "--data.resolution 66 cannot be halved 2 times"),
        (["--autoencoder.halvings", "7"], "or another --autoencoder.halvings"),
        (["--commitment", "-1"], "--commitment and --revive-below must not be negative"),
        (["--decay", "1"], "--decay 1.0 must be at least 0 and below 1"),
        (["--data.batch", "1"], "a batch has 256 vectors for 512 codes"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["vqvae_birds", *flags, "--data.name", "synthetic", "--device", "cpu"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error
