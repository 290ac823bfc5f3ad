"""AttnGAN: attention to the right words, the losses, and where its encoders come from."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from engine import damsm, encoders, evaluate, recipe, sample, session, train
from engine.compile import Compiler
from engine.damsm import Features, Sharpness
from engine.everyone import next_of_all
from engine.networks import attngan
from engine.networks.spec import ImageSpec
from engine.steps.matching import Matching
from engine.steps.text_to_image import judges_update, painted, painter_update
from engine.stored import Loaded
from engine.trained import open_run
from engine.world import Ranks
from kernels import philox
from pipelines.batch import Batch
from tests.players import FP32, RANKS
from tests.runs import QUICK, captions_of, final_state, run_folder, toy
from tests.test_capture import Guard

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
T, FEATURES = 5, 8
GENERATOR = attngan.Generator(latent=6, condition=4, width=4, blocks=1, stages=2, features=FEATURES)
CRITICS = attngan.Discriminators(width=4, stages=2, features=FEATURES)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.tensor([1, 5, 3])


# attention


def attention_by_hand(layer: attngan.WordAttention, x_CHW: Tensor, words_TD: Tensor) -> Tensor:
    """What each place of one image takes of the words of its caption, which has no filling."""
    word_TC = words_TD @ layer.to_map.weight.T
    taken_CHW = torch.zeros_like(x_CHW)
    for row in range(x_CHW.shape[1]):
        for column in range(x_CHW.shape[2]):
            share_T = (word_TC @ x_CHW[:, row, column]).softmax(0)
            taken_CHW[:, row, column] = share_T @ word_TC
    return taken_CHW


def test_each_image_attends_to_the_words_of_its_own_caption_alone():
    layer = attngan.WordAttention(4, FEATURES)
    x_NCHW, words_NTD = noise(3, 4, 3, 3), noise(3, T, FEATURES, seed=1)
    there_NT = torch.arange(T) < LENGTHS[:, None]
    taken_NCHW, share_NTHW = layer(x_NCHW, words_NTD, there_NT)
    for n, length in enumerate(LENGTHS):
        expected_CHW = attention_by_hand(layer, x_NCHW[n], words_NTD[n, :length])
        torch.testing.assert_close(taken_NCHW[n], expected_CHW)
        assert not share_NTHW[n, length:].any()
        torch.testing.assert_close(share_NTHW[n].sum(0), torch.ones(3, 3))


def test_the_masks_order_matters_where_a_batch_has_several_captions():
    """With each image's places one after the other, a mask repeated as a whole (as public code has
    it) hides the words of other captions than the image's own."""
    places, there_NT = 9, torch.arange(T) < LENGTHS[:, None]
    right = there_NT.repeat_interleave(places, 0)
    assert not torch.equal(there_NT.repeat(places, 1), right)
    layer = attngan.WordAttention(4, FEATURES)
    x_NCHW, words_NTD = noise(3, 4, 3, 3), noise(3, T, FEATURES, seed=1)
    query_MC = x_NCHW.flatten(2).transpose(1, 2).flatten(0, 1)
    word_MTC = layer.to_map(words_NTD).repeat_interleave(places, 0)
    score_MT = (word_MTC @ query_MC[:, :, None])[:, :, 0]
    share_NTHW = layer(x_NCHW, words_NTD, there_NT)[1]
    for mask_MT, same in ((right, True), (there_NT.repeat(places, 1), False)):
        share_MT = score_MT.masked_fill(~mask_MT, -torch.inf).softmax(1)
        found = share_MT.view(3, places, T).transpose(1, 2).reshape(3, T, 3, 3)
        assert torch.allclose(found, share_NTHW) == same


# networks


def test_sizes_are_those_of_the_paper():
    spec = ImageSpec(3, 256)
    with torch.device("meta"):
        painter, judges = attngan.Generator().build(spec), attngan.Discriminators().build(spec)
    images, shares = painter(
        *(torch.empty(s, device="meta") for s in ((2, 100), (2, 100))),
        torch.empty(2, 18, 256, device="meta"),
        torch.empty(2, dtype=torch.int64, device="meta"),
    )
    assert [x.shape[2:] for x in images] == [(64, 64), (128, 128), (256, 256)]
    assert [x.shape for x in shares] == [(2, 18, 64, 64), (2, 18, 128, 128)]
    assert painter.first.dense.out_features == 2 * 16 * 32 * 4 * 4
    for judge, side in zip(judges.of_size, (64, 128, 256), strict=True):
        seen = judge.features(torch.empty(2, 3, side, side, device="meta"))
        assert seen.shape == (2, 512, 4, 4)
        told = judge.with_caption(seen, torch.empty(2, 256, device="meta"))
        assert told.shape == judge.alone(seen).shape == (2,)


@pytest.mark.parametrize("resolution", [10, 24, 8])
def test_sizes_that_do_not_halve_are_refused(resolution):
    with pytest.raises(ValueError, match=rf"--data\.resolution {resolution} does not halve"):
        GENERATOR.build(ImageSpec(3, resolution))


def test_stages_without_a_judge_are_refused():
    step = recipe.load("attngan_birds").step
    few = replace(step.generator, network=replace(step.generator.network, stages=2))
    with pytest.raises(ValueError, match=r"stages 2 and --discriminators\.stages 3"):
        replace(step, generator=few).check()
    other = replace(step.generator, network=replace(step.generator.network, features=128))
    with pytest.raises(ValueError, match=r"give --generator\.features 256"):
        replace(step, generator=other).check()


# losses


def log_loss(logit_N: Tensor, real: bool) -> Tensor:
    """-E[log p] of the right answer, naively, in float64."""
    p_N = 1 / (1 + torch.exp(-logit_N.double()))
    return -torch.log(p_N if real else 1 - p_N).mean()


def test_the_discriminators_loss_is_the_written_one():
    judges = CRITICS.build(ImageSpec(3, 16)).double()
    real, made = noise(4, 3, 16, 16).double(), (noise(4, 3, 8, 8), noise(4, 3, 16, 16, seed=2))
    right, wrong = noise(4, FEATURES).double(), noise(4, FEATURES, seed=3).double()
    loss, values = judges_update(judges, real, right, wrong, *(x.double() for x in made))
    reals, expected = (F.interpolate(real, (8, 8), mode="area"), real), []
    for judge, x, y in zip(judges.of_size, reals, made, strict=True):
        seen, faked = judge.features(x), judge.features(y.double())
        good = log_loss(judge.alone(seen), True) + log_loss(judge.with_caption(seen, right), True)
        bad = log_loss(judge.alone(faked), False)
        bad = bad + log_loss(judge.with_caption(faked, right), False)
        bad = bad + log_loss(judge.with_caption(seen, wrong), False)
        expected.append((good / 2 + bad / 3).item())
    assert [v.item() for v in values.values()] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5)


def test_the_generators_loss_is_the_written_one():
    painter, judges = (s.build(ImageSpec(3, 16)) for s in (GENERATOR, CRITICS))
    small = recipe.load("damsm_birds").step.encoders.network
    sizes = replace(small, words=20, vector=6, features=FEATURES, width=4, side=16)
    both = sizes.build(ImageSpec(3, 16)).eval()
    lengths_N, labels_N = torch.tensor([1, 5, 3, 2]), torch.tensor([0, 1, 1, 2])
    tokens_NT = torch.randint(20, (4, T), generator=torch.Generator().manual_seed(0))
    read = [part.detach() for part in both.text(tokens_NT, lengths_N)]
    z_NL = noise(4, 10)
    whole = painted(painter, z_NL, *read, lengths_N)
    args = (judges, both, *read, lengths_N, labels_N)
    loss, _ = painter_update(whole, *args, ranks=ALONE, matching=5.0)
    mean, log_variance = painter.condition(read[1])
    told = mean + (0.5 * log_variance).exp() * z_NL[:, 6:]
    images, _ = painter(z_NL[:, :6], told, read[0], lengths_N)
    expected = 0.0
    for judge, made in zip(judges.of_size, images, strict=True):
        seen = judge.features(made)
        expected += log_loss(judge.alone(seen), True)
        expected += log_loss(judge.with_caption(seen, read[1]), True)
    regions, whole = both.image(images[-1])
    f = Features(regions.flatten(2), whole, *read, lengths_N, labels_N)
    expected += 5.0 * sum(damsm.losses(f, Sharpness()))
    expected += 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert images[-1].shape == (4, 3, 16, 16)


def test_a_wrong_caption_is_that_of_the_next_image_of_all_ranks(monkeypatch):
    whole_MF = torch.arange(12.0).view(6, 2)
    expected_MF = torch.cat([whole_MF[1:], whole_MF[:1]])
    assert torch.equal(next_of_all(ALONE, whole_MF), expected_MF)
    monkeypatch.setattr(Ranks, "concatenated", lambda self, x: whole_MF)
    shown = [next_of_all(Ranks(r, r, 2, ALONE.device), whole_MF[3 * r :][:3]) for r in (0, 1)]
    assert torch.equal(torch.cat(shown), expected_MF)


@pytest.mark.parametrize("name", ["damsm_birds", "attngan_birds"])
def test_an_iteration_keeps_the_capture_contract(name, monkeypatch):
    """See tests/test_capture.py: no value to the host, none from it, no shape that data decides."""
    monkeypatch.setattr(philox, "by_numpy", lambda index_N: False)
    small = toy(name, 4)[0]
    live = session.start(small, RANKS, FP32, Compiler(False, ""), 100)
    shape = (4, small.data.channels, small.data.resolution, small.data.resolution)
    labels_N, position_N = torch.arange(4), live.clock.position_N()
    batch = Batch(noise(*shape), labels_N, position_N, None, *captions_of(small, 4))
    live.step(batch)
    with Guard() as guard:
        live.step(batch)
    assert {"convolution_backward", "embedding_dense_backward"} <= guard.seen


# runs


def trained(name: str, runs: Path, *more: str, steps: int = 2) -> Path:
    """A toy run, through the command line."""
    flags = [*toy(name, 4)[1], *QUICK, "--compile", "off", "--device", "cpu", "--samples", "4"]
    flags += ["--runs", str(runs), "--steps", str(steps), *more]
    assert train.main([name, *flags]) == 0
    return run_folder(runs, name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a run of DAMSM and of one of AttnGAN that takes its encoders."""
    runs = tmp_path_factory.mktemp("runs")
    before = trained("damsm_birds", runs, "--encoders.vector", "10")
    return before, trained("attngan_birds", runs, "--damsm", str(before))


@pytest.mark.slow
def test_encoders_of_another_run_are_taken_and_stay_as_they_are(pair):
    before, after = (final_state(folder) for folder in pair)
    stored = json.loads((pair[1] / "recipe.json").read_text())["values"]["step"]
    assert stored["encoders"]["network"]["vector"] == 10  # its sizes come along
    assert len(stored["encoders_digest"]) == 64
    paths = [path for path in before if path.startswith("encoders/network/")]
    assert paths and all(torch.equal(before[path], after[path]) for path in paths)
    assert not any("encoders/optimizer" in path for path in after)


@pytest.mark.slow
def test_the_run_is_that_of_the_encoders_content_wherever_they_lie(pair, tmp_path, capsys):
    before, after = pair
    moved = tmp_path / "moved"
    shutil.copytree(before, moved)
    runs = after.parent.parent
    trained("attngan_birds", runs, "--damsm", str(moved), steps=3)
    assert run_folder(runs, "attngan_birds") == after
    assert "resuming" in capsys.readouterr().out
    shutil.rmtree(moved)
    assert open_run(after, device="cpu").images == 12  # it has encoders of its own


@pytest.mark.slow
def test_captions_are_drawn_with_the_place_of_each_word(pair, tmp_path, capsys):
    said = [str(pair[1]), "--caption", "A red blob, quickly", "--num", "3", "--device", "cpu"]
    out = tmp_path / "maps.png"
    assert sample.main([*said, "--attention", "--out", str(out)]) == 0
    assert "quickly" in "".join(capsys.readouterr())
    with Image.open(out) as picture:
        width, height = picture.size
    assert width > 4 * 80 and height > 3 * 80  # an image and three words, three samples
    assert sample.main([*said, "--out", str(tmp_path / "made.png")]) == 0
    assert sample.main([str(pair[0]), *said[1:]]) == 2  # DAMSM draws nothing


@pytest.mark.slow
def test_r_precision_is_measured_of_both(pair, tmp_path):
    for folder, extra in zip(pair, (set(), {"r_precision_real"}), strict=True):
        out = tmp_path / "figures.json"
        assert evaluate.main([str(folder), "--device", "cpu", "--json", str(out)]) == 0
        (found,) = json.loads(out.read_text()).values()
        assert found["figures"].keys() == {"r_precision", "r_precision_chance"} | extra
        assert all(0 <= value <= 1 for value in found["figures"].values())


def refusal(capsys, *flags: str) -> str:
    small = toy("attngan_birds", 4)[1]
    with pytest.raises(SystemExit) as stopped:
        train.main(["attngan_birds", *small, "--dry-run", *flags])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_is_no_run_of_damsm_is_refused(tmp_path, capsys):
    assert "--damsm" in refusal(capsys, "--damsm", str(tmp_path / "none"))


@pytest.mark.slow
def test_other_runs_and_other_words_are_refused(pair, tmp_path, capsys, monkeypatch):
    assert "is a run of attngan_birds" in refusal(capsys, "--damsm", str(pair[1]))
    index = Loaded.__init__

    def of_other_words(self, *args):
        index(self, *args)
        self.index["words"] = ["<end>", "wing"]

    encoders.open_damsm.cache_clear()
    monkeypatch.setattr(Loaded, "__init__", of_other_words)
    said = refusal(capsys, "--damsm", str(pair[0]))
    encoders.open_damsm.cache_clear()
    assert "captions of other words (2 then" in said and "'a' among them" in said


def test_what_is_taken_in_place_of_what_is_not_given_is_said():
    assert "trained alongside" in recipe.load("attngan_birds").step.notes()[0]
    assert "not the paper's encoder" in recipe.load("damsm_birds").step.notes()[0]
    given = replace(recipe.load("damsm_birds").step, inception=Path("weights.pth"))
    assert isinstance(given, Matching) and given.settled().encoders.network.inception
    assert "Inception-v3" in given.notes()[0]


def test_a_generator_of_one_stage_has_nothing_to_show():
    step = recipe.load("attngan_birds").step
    one = replace(GENERATOR, stages=1).build(ImageSpec(3, 16)).eval()
    reader = partial(lambda *_: (noise(2, T, FEATURES), noise(2, FEATURES)))
    networks = {"generator": one, "encoders": type("Both", (), {"text": staticmethod(reader)})}
    with pytest.raises(ValueError, match="one stage"):
        step.attended(networks, noise(2, 10), torch.zeros(2, T), torch.tensor([2, 3]))
