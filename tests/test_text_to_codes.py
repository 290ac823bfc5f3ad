"""DALL-E's step: its loss and figures by hand, its two phases, what it draws of captions."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine import checkpoint, sample
from engine.metrics.open import open_evaluator
from engine.networks.dalle import WORDS, TextAndCodes
from engine.networks.spec import ImageSpec
from engine.recipe import check, load, parse
from engine.session import build_networks
from engine.steps.text_to_codes import nll, words_and_codes
from engine.stored import Loaded
from engine.train import main
from pipelines.batch import Batch
from tests.forked import Run, train
from tests.players import RANKS, pictures
from tests.runs import (
    QUICK,
    captions_of,
    differences,
    final_state,
    kill_once_at,
    newest_picture,
    run_folder,
    toy,
)

NAME = "dalle_birds"
SMALL = [*toy(NAME, 8)[1], *QUICK, "--precision", "fp32", "--compile", "off"]
PHASES, OFTEN = ["--vqvae-steps", "2"], ["--checkpoint-every", "0.008", "--keep", "10000"]


class Fixed(nn.Module):
    """Logits that are parameters, whatever is given; 3 words, places of a caption of 2."""

    def __init__(self, images: int, codes: int) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.text = nn.Parameter(torch.randn(images, 2, 5, generator=noise))
        self.code = nn.Parameter(torch.randn(images, codes, 4, generator=noise))

    def padded(self, tokens_NL: Tensor, lengths_N: Tensor) -> Tensor:
        place_L = torch.arange(2)
        return torch.where(place_L < lengths_N[:, None], tokens_NL, 3 + place_L)

    def forward(self, tokens_NL: Tensor, lengths_N: Tensor, code_NM: Tensor) -> tuple:
        return self.text, self.code


def test_the_loss_is_that_by_hand():
    """In float64, with its gradient: softmax less the one that was there, by weight and places."""
    network = Fixed(2, 3)
    tokens_NL, lengths_N = torch.tensor([[2, 1], [1, 0]]), torch.tensor([2, 1])
    code_NM = torch.tensor([[0, 3, 1], [2, 2, 0]])
    loss, values = words_and_codes(network, tokens_NL, lengths_N, code_NM, text=1 / 8)
    loss.backward()
    goals = {"text": [[2, 1], [1, 4]], "code": code_NM.tolist()}
    means = {}
    for name, weight in (("text", 1 / 8), ("code", 7 / 8)):
        logits, goal = getattr(network, name).detach().double(), goals[name]
        images, places = logits.shape[:2]
        total, slope = 0.0, torch.zeros_like(logits)
        for n in range(images):
            for i in range(places):
                share = [math.exp(v) for v in logits[n, i].tolist()]
                share = [v / sum(share) for v in share]
                total -= math.log(share[goal[n][i]])
                slope[n, i] = torch.tensor(share)
                slope[n, i, goal[n][i]] -= 1
        means[name] = total / images / places
        wanted = weight * slope / images / places
        torch.testing.assert_close(
            getattr(network, name).grad.double(), wanted, rtol=1e-5, atol=1e-7
        )
    assert loss.item() == pytest.approx(means["text"] / 8 + means["code"] * 7 / 8, rel=1e-6)
    for name, mean in means.items():
        assert values[f"{name}_bits"].item() == pytest.approx(mean / math.log(2), rel=1e-6)


def test_figures_are_those_by_hand():
    """Two images of four codes out of 8; captions of 3 and 1 words, each with its end."""
    step = load(NAME).step
    sizes = replace(step.autoencoder.network, codes=8)
    step = replace(step, autoencoder=replace(step.autoencoder, network=sizes))
    found = step.summarise(
        {
            "reconstruction": torch.tensor([0.1, 0.3]).double(),
            "code": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]]).double(),
            "text": torch.tensor([5.0, 1.0]).double() * math.log(2),
            "codes": torch.tensor([6.0, 10.0]).double() * math.log(2),
            "word": torch.tensor([[4, 5, 4, 0], [4, 0, -1, -1]]).double(),
        },
        None,
    )
    assert found["reconstruction"] == pytest.approx(0.2)
    assert found["code_bits"] == pytest.approx(16 / 8)
    share = (4 / 8, 3 / 8, 1 / 8)
    entropy = -sum(p * math.log2(p) for p in share)
    assert found["code_bits_frequencies"] == pytest.approx(entropy)
    assert found["code_bits_uniform"] == 3
    assert found["word_bits"] == pytest.approx(6 / 6)
    share = (2 / 6, 3 / 6, 1 / 6)
    assert found["word_bits_frequencies"] == pytest.approx(-sum(p * math.log2(p) for p in share))


def example(count: int = 4) -> tuple[dict[str, nn.Module], Batch]:
    recipe = toy(NAME)[0]
    networks = {name: network.eval() for name, network in build_networks(recipe).items()}
    tokens_NL, lengths_N = captions_of(recipe, count)
    images_NCHW = pictures(count, recipe.data.resolution, 0)
    place_N = torch.arange(count)
    return networks, Batch(images_NCHW, None, place_N, tokens_NL=tokens_NL, lengths_N=lengths_N)


@torch.no_grad()
def test_held_out_values_are_of_each_image():
    """Whatever others stand beside it; the words end with their end."""
    (networks, batch), step = example(), toy(NAME)[0].step
    values = step.held_out(networks, batch, torch.tensor(0))
    text_NL, nll_NM = nll(networks["transformer"], batch.tokens_NL, batch.lengths_N, values["code"])
    torch.testing.assert_close(values["codes"], nll_NM.sum(1))
    torch.testing.assert_close(values["text"], text_NL.sum(1))
    for n, length in enumerate(batch.lengths_N.tolist()):
        words = [*batch.tokens_NL[n, :length].tolist(), 0]
        assert values["word"][n].tolist() == [*words, *[-1] * WORDS][:WORDS]
    last = slice(3, 4)
    alone = Batch(batch.images_NCHW[last], None, batch.position_N[last])
    alone.tokens_NL, alone.lengths_N = batch.tokens_NL[last], batch.lengths_N[last]
    one = step.held_out(networks, alone, torch.tensor(0))
    torch.testing.assert_close(one["codes"], values["codes"][last], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_columns_are_the_image_its_codes_and_a_sample():
    (networks, batch), step = example(), toy(NAME)[0].step
    given, remade, drawn = step.columns(networks, batch)
    assert torch.equal(given, batch.images_NCHW)
    assert torch.equal(remade, step.reconstruct(networks, given))
    assert drawn.shape == given.shape and drawn.abs().max() <= 1
    assert torch.equal(drawn, step.columns(networks, batch)[2])  # the same each time
    sharp = replace(step, temperature=1e-4).columns(networks, batch)[2]
    likeliest = replace(step, top=1).columns(networks, batch)[2]
    assert torch.equal(sharp, likeliest) and not torch.equal(sharp, drawn)


def test_it_learns_what_captions_say():
    """Codes that are the second word's number, but for their first ones, which are free."""
    torch.manual_seed(0)
    sizes = TextAndCodes(width=32, depth=2, heads=4, codes=5, halvings=2, words=6)
    network = sizes.build(ImageSpec(3, 12))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    noise = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, generator=noise)

    def captions(count: int) -> tuple[Tensor, Tensor]:
        tokens_NL = draw(0, 5, (count, WORDS))
        tokens_NL[:, 2:] = 0
        return tokens_NL, torch.full((count,), 2)

    for _ in range(120):
        tokens_NL, lengths_N = captions(32)
        code_NM = tokens_NL[:, 1:2].repeat(1, 9)
        code_NM[:, 0] = draw(0, 5, (32,))
        loss, values = words_and_codes(network, tokens_NL, lengths_N, code_NM, text=1 / 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values["code_bits"] < 1.15 * math.log2(5) / 9
    tokens_NL, lengths_N = captions(50)
    with torch.no_grad():
        u_NM = torch.rand(50, 9, generator=noise)
        code_NM = network.eval().generate(tokens_NL, lengths_N, u_NM)
    assert (code_NM[:, 1:] == tokens_NL[:, 1:2]).float().mean() > 0.97
    share_K = torch.bincount(code_NM[:, 0], minlength=5) / 50
    assert share_K.max() < 0.5


# runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Four steps, two of the autoencoder and two of the transformer, a checkpoint after each."""
    runs = tmp_path_factory.mktemp("dalle")
    train(NAME, *SMALL, *PHASES, *OFTEN, "--steps", "4", "--runs", str(runs))
    return run_folder(runs, NAME)


def test_each_phase_trains_its_player_and_no_other(whole_run):
    folders = checkpoint.listing(whole_run / "checkpoints")[::-1]
    states = [dict(Loaded(folder).shared) for folder in folders]
    networks = [path for path in states[0] if "/network/" in path]
    moved = [
        {path.split("/")[0] for path in networks if not torch.equal(a[path], b[path])}
        for a, b in pairwise(states)
    ]
    assert moved == [{"autoencoder"}, {"transformer"}, {"transformer"}]


@pytest.mark.parametrize("images", [8, 24])
def test_a_run_killed_in_either_phase_goes_on_bit_for_bit(whole_run, tmp_path, images):
    common = [*SMALL, *PHASES, "--runs", str(tmp_path), "--run", "killed"]
    killed = tmp_path / NAME / "killed"
    kill_once_at(killed, images, Run(NAME, *common, *OFTEN, "--steps", "3000"))
    train(NAME, *common, "--steps", "4")
    assert not differences(final_state(whole_run), final_state(killed))
    assert newest_picture(whole_run) == newest_picture(killed)


def test_two_ranks_train_the_transformer_as_one_does(tmp_path):
    common = [*SMALL, "--vqvae-steps", "1", "--steps", "3", "--transformer.eps", "1e-3"]
    for ranks in (1, 2):
        train(NAME, *common, "--runs", str(tmp_path / str(ranks)), ranks=ranks)
    one, two = (final_state(run_folder(tmp_path / str(ranks), NAME)) for ranks in (1, 2))
    for path in one:
        if "transformer/network" in path:
            torch.testing.assert_close(two[path], one[path], rtol=1e-3, atol=2e-5, msg=path)


def drawn(run, out, *flags: str) -> bytes:
    arguments = [str(run), "--caption", "a red blob", "--num", "3", "--out", str(out), *flags]
    assert sample.main(arguments) == 0
    with Image.open(out) as picture:
        return picture.tobytes()


def test_captions_are_drawn(whole_run, tmp_path, capsys):
    out = tmp_path / "caption.png"
    first = drawn(whole_run, out)
    assert first == drawn(whole_run, out)
    assert first != drawn(whole_run, out, "--seed", "1")
    assert drawn(whole_run, out, "--batch", "2") == first  # no image depends on its neighbours
    capsys.readouterr()
    assert drawn(whole_run, out, "--caption", "a red flying blob") == first
    assert "not among the words of training: flying" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--caption", " ,"], "has no words"),
        (["--caption", "unheard of"], "no word of the caption 'unheard of' stands in"),
        ([], "engine.sample RUN_DIR --caption"),
        (["--interpolate"], "engine.sample RUN_DIR --caption"),
    ],
)
def test_what_cannot_be_drawn_is_refused(whole_run, tmp_path, capsys, flags, words):
    assert sample.main([str(whole_run), "--out", str(tmp_path / "x.png"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_run_is_measured_on_held_out_captions(whole_run, monkeypatch):
    lines = [json.loads(line) for line in (whole_run / "stats.jsonl").read_text().splitlines()]
    last = {k: v for line in lines for k, v in line.get("values", {}).items()}
    uniform, words = math.log2(64), math.log2(681 + WORDS)
    assert last["test/code_bits_uniform"] == uniform
    assert last["test/code_bits_frequencies"] < uniform < last["test/code_bits"] + 0.2
    # each caption has 18 places, of which 4 or 5 are words and the end
    assert last["test/word_bits"] == pytest.approx(words * WORDS / 5, rel=0.1)
    monkeypatch.setattr("engine.metrics.open.ComparedEvaluator", lambda *given: "of held-out ones")
    assert open_evaluator(toy(NAME)[0], RANKS, print) == "of held-out ones"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transformer.codes", "9"], "--transformer.codes 9 must be the autoencoder's, 512"),
        (["--autoencoder.halvings", "3"], "--transformer.halvings 2 must be the autoencoder's, 3"),
        (["--autoencoder.ema-kimg", "5"], "--autoencoder.ema-kimg must be 0"),
        (["--vqvae-steps", "0"], "--vqvae-steps must be at least 1"),
        (["--text", "1"], "--text 1 must be at least 0"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--top", "-1"], "--temperature must be above 0, and --top not negative"),
        (["--commitment", "-1"], "--commitment and --revive-below"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        check(parse(NAME, flags).recipe, 1)


def test_an_autoencoder_of_another_run_is_taken(tmp_path, capsys):
    """As it is, into this run's checkpoint, which then needs the other run no more."""
    runs = ["--runs", str(tmp_path)]
    common = [*toy("vqvae_birds", 8)[1], *QUICK, "--precision", "fp32", "--compile", "off"]
    train("vqvae_birds", *common, "--data.resolution", "32", "--steps", "1", *runs)
    vqvae = run_folder(tmp_path, "vqvae_birds")
    train(NAME, *SMALL, "--vqvae", str(vqvae), "--steps", "2", *runs)
    run = run_folder(tmp_path, NAME)
    other, own = final_state(vqvae), final_state(run)
    paths = [path for path in other if "autoencoder/network" in path]
    assert paths and all(torch.equal(own[path], other[path]) for path in paths)
    with pytest.raises(SystemExit) as end:
        main([NAME, *SMALL, "--vqvae", str(vqvae), "--autoencoder.width", "16", *runs])
    assert end.value.code == 2
    assert "is another autoencoder, VectorQuantised(width=32" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([NAME, *SMALL, "--vqvae", str(run.parent), *runs])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "is not a run directory" in error and "engine.train vqvae_birds trains one" in error
    elsewhere = vqvae.rename(tmp_path / "elsewhere")
    train(NAME, *SMALL, "--vqvae", str(elsewhere), "--steps", "3", *runs)
    assert run_folder(tmp_path, NAME) == run  # which has gone on
    shutil.rmtree(elsewhere)
    drawn(run, tmp_path / "caption.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--latent", "9"], "--latent 9 is too few for the 64 codes of an image"),
        (["--data.name", "synthetic"], "has no captions"),
        (["--transformer.words", "5"], "--transformer.words 5: the captions have"),
        (["--transformer.heads", "5"], "is not a multiple of --transformer.heads 5"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([NAME, *SMALL, *flags, "--runs", str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error
