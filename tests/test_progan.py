"""Progressive GAN: its layers, fading, the schedule, and optimizers that begin anew."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import session
from engine.compile import Compiler
from engine.describe import parameters
from engine.networks import progan
from engine.networks.equalised import Conv2d, Linear, deviation, pixel_norm
from engine.networks.progan import STEPS, Grown, blend, faded
from engine.networks.spec import ImageSpec
from engine.recipe import check, load
from engine.session import Session
from engine.steps.progressive import parts_of
from pipelines.batch import Batch, Clock
from tests.forked import Run, train
from tests.players import BATCH, CPU, FP32, RANKS, moved, weights
from tests.runs import QUICK, differences, final_state, kill_once_at, run_folder, toy

SMALL = ImageSpec(3, 16)
NARROW_G = progan.Generator(latent=6, width=8, base=24)  # widths 8 6 3
NARROW_D = progan.Discriminator(width=8, base=24)
ONE = torch.tensor(1.0)
SHORT = {"stable_steps": 2, "fade_steps": 4, "updates": (1, 1, 2)}  # levels at 0, 2, 8; done at 12


def started(**changes) -> Session:
    recipe = toy("progan_celeba", BATCH)[0]
    recipe = replace(recipe, data=replace(recipe.data, resolution=16))
    step = replace(recipe.step, **(SHORT | changes))
    for player, network in (("generator", NARROW_G), ("discriminator", NARROW_D)):
        step = replace(step, **{player: replace(step.players()[player], network=network)})
    recipe = replace(recipe, step=step)
    check(recipe, 1)
    return session.start(recipe, RANKS, FP32, Compiler(False, "test"), 1000)


def iterate(live: Session) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(live.clock.images)
    images = torch.rand(BATCH, 3, 16, 16, generator=random) * 2 - 1
    values = live.step(Batch(images, None, live.clock.position_N()))
    live.clock.advance()
    return values


def generator() -> nn.Module:
    torch.manual_seed(0)
    return NARROW_G.build(SMALL)


def critic() -> nn.Module:
    torch.manual_seed(1)
    return NARROW_D.build(SMALL)


# layers


def test_weights_are_scaled_at_run_time_and_not_when_they_are_drawn():
    torch.manual_seed(0)
    layer, last = Conv2d(50, 40, 3), Linear(5000, 1, gain=1)
    assert layer.weight.std().item() == pytest.approx(1, rel=0.02) and not layer.bias.any()
    x_NCHW = torch.randn(2, 50, 4, 4)
    scaled = math.sqrt(2 / (50 * 9)) * layer.weight
    wanted = nn.functional.conv2d(x_NCHW, scaled, layer.bias, padding=1)
    torch.testing.assert_close(layer(x_NCHW), wanted)
    x_NL = torch.randn(3, 5000)
    torch.testing.assert_close(last(x_NL), x_NL @ last.weight.T / math.sqrt(5000))


def test_the_generator_s_first_layer_has_a_quarter_of_the_gain():
    dense = generator().first.dense
    assert dense.gain == pytest.approx(math.sqrt(2) / 4 / math.sqrt(6)) and dense.bias is None
    assert all(
        layer.gain == pytest.approx(1 / math.sqrt(w))
        for layer, w in zip(generator().to_rgb, (8, 6, 3), strict=True)
    )
    assert critic().last.dense1.gain == pytest.approx(1 / math.sqrt(8))


def test_pixel_norm_divides_by_the_root_mean_square_over_channels():
    x_NCHW = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    wanted = x_NCHW / math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(pixel_norm(x_NCHW), wanted)
    assert pixel_norm(torch.zeros(1, 2)).eq(0).all()
    assert pixel_norm(x_NCHW.bfloat16()).dtype == torch.bfloat16


def test_deviation_is_that_of_each_group_averaged_over_all_values():
    x_NCHW = torch.tensor([[1.0, 2.0], [3.0, 2.0], [0.0, 0.0], [0.0, 4.0]]).view(4, 2, 1, 1)
    found = deviation(x_NCHW.double(), 2)
    # the first pair deviates by (1, 0), the second by (0, 2)
    torch.testing.assert_close(found[:, :2], x_NCHW.double())
    wanted = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    torch.testing.assert_close(found[:, 2:], wanted, atol=1e-4, rtol=0)


def test_deviation_is_the_same_where_two_ranks_share_the_batch():
    x_NCHW = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    halves = [deviation(half, 4) for half in x_NCHW.chunk(2)]
    torch.testing.assert_close(torch.cat(halves), deviation(x_NCHW, 4))
    assert deviation(x_NCHW[:6], 4).isfinite().all()  # groups of two


# fading


@pytest.mark.parametrize("level", [1, 2])
def test_a_generator_s_level_comes_in_from_the_one_before_it(level):
    net, z_NL = generator(), torch.randn(4, 6)
    before = net(z_NL, level - 1, ONE)
    doubled = before.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(net(z_NL, level, torch.tensor(0.0)), doubled)
    x_NCHW = net.first(z_NL)
    for block in list(net.blocks)[:level]:
        x_NCHW = block(x_NCHW)
    alone = net.to_rgb[level](x_NCHW)
    assert torch.equal(net(z_NL, level, ONE), alone)
    between = net(z_NL, level, torch.tensor(0.25))
    torch.testing.assert_close(between, 0.75 * doubled + 0.25 * alone)


@pytest.mark.parametrize("level", [1, 2])
def test_a_discriminator_s_level_comes_in_from_the_one_before_it(level):
    net, x_NCHW = critic(), torch.randn(4, 3, 4 * 2**level, 4 * 2**level)
    small_NCHW = nn.functional.avg_pool2d(x_NCHW, 2)
    wanted = net(small_NCHW, level - 1, ONE)
    torch.testing.assert_close(net(x_NCHW, level, torch.tensor(0.0)), wanted)
    inner = nn.functional.leaky_relu(net.from_rgb[level](x_NCHW), 0.2)
    for block in list(net.blocks)[:level][::-1]:
        inner = block(inner)
    torch.testing.assert_close(net(x_NCHW, level, ONE), net.last(inner))


def test_real_images_are_halved_by_the_mean_and_blurred_while_a_level_comes_in():
    x_NCHW = torch.arange(16.0).view(1, 1, 4, 4)
    half = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).view(1, 1, 2, 2)
    assert torch.equal(faded(x_NCHW, 1, None), half)
    wanted = 0.25 * half + 0.75 * 7.5
    torch.testing.assert_close(faded(x_NCHW, 1, torch.tensor(0.25)), wanted)
    assert torch.equal(faded(x_NCHW, 1, ONE), half)


def test_fading_keeps_a_fine_alpha_for_bfloat16():
    found = blend(torch.zeros(2).bfloat16(), torch.ones(2).bfloat16(), torch.tensor(0.0001))
    assert found.dtype == torch.float32 and found[0] == pytest.approx(0.0001)


@pytest.mark.parametrize(("growth", "level", "alpha"), [(0, 0, 1), (0.25, 1, 0.25), (1.5, 2, 0.5)])
def test_what_is_shown_is_the_growth_in_the_full_resolution(growth, level, alpha):
    net, z_NL = generator(), torch.randn(2, 6)
    for layer in net.to_rgb:  # away from the bounds of -1 and 1
        layer.weight.data.mul_(0.2)
    net.growth.fill_(round(growth * STEPS))
    images_NCHW = net(z_NL, level, torch.tensor(alpha))
    images_NCHW = nn.functional.interpolate(images_NCHW, size=16)
    torch.testing.assert_close(Grown(net)(z_NL), images_NCHW.clamp(-1, 1))


# sizes


def conv(before: int, after: int, kernel: int = 3) -> int:
    return before * after * kernel**2 + after


def test_parameters_are_those_of_the_published_networks_at_64_pixels():
    """Table 2 of the paper, with the 1x1 convolutions from and to images of every resolution."""
    shape = ImageSpec(3, 64)
    wanted = 512 * 512 * 16 + 512 + conv(512, 512)  # 4x4
    wanted += 3 * 2 * conv(512, 512) + conv(512, 256) + conv(256, 256)  # 8, 16, 32; 64
    wanted += 4 * conv(512, 3, 1) + conv(256, 3, 1)
    assert parameters(progan.Generator().build(shape)) == wanted == 22_490_383
    wanted = conv(513, 512) + 512 * 16 * 512 + 512 + 512 + 1
    wanted += 3 * 2 * conv(512, 512) + conv(256, 256) + conv(256, 512)
    wanted += 4 * conv(3, 512, 1) + conv(3, 256, 1)
    assert parameters(progan.Discriminator().build(shape)) == wanted == 22_498_049


def test_parameters_are_those_that_the_paper_gives_at_1024_pixels():
    with torch.device("meta"):
        for sizes in (progan.Generator(), progan.Discriminator()):
            network = sizes.build(ImageSpec(3, 1024))
            assert round(parameters(network) / 1e6, 1) == 23.1  # table 2


# schedule


def test_levels_and_alpha_follow_the_clock():
    step = load("progan_celeba").step
    step = replace(step, stable_steps=600, fade_steps=200)
    found = [step.level(i) for i in (0, 599, 600, 1399, 1400, 3000)]
    assert found == [0, 0, 1, 1, 2, 4]
    assert [step.begins(k) for k in range(4)] == [0, 600, 1400, 2200]
    alphas = [float(step.alpha(1, torch.tensor(i))) for i in (600, 650, 799, 800, 1399)]
    assert alphas == pytest.approx([0, 0.25, 0.995, 1, 1])
    assert float(step.alpha(0, torch.tensor(5))) == 1
    assert step.kinds() == (0, 800, 1600, 2400, 3200) and step.settles() == 3200
    assert step.kinds()[1] < step.begins(2)


def test_a_run_grows_as_the_schedule_says():
    live = started()
    grown = [float(iterate(live)["generator/level"]) for _ in range(14)]
    wanted = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1.25, 1.5, 1.75, 2, 2]
    assert grown == wanted
    assert live.players["generator"].network.growth == 2 * STEPS
    assert live.players["generator"].average.network.growth == 2 * STEPS  # and not an average
    assert live.players["generator"].stride == 0.5


def test_layers_not_in_use_stay_as_they_are_and_the_others_learn():
    live = started()
    network = live.players["generator"].network
    later, first = weights(network.blocks), weights(network.first)
    for _ in range(2):
        iterate(live)
    assert not moved(network.blocks, later) and moved(network.first, first)
    for _ in range(6):
        iterate(live)
    assert moved(network.blocks[0], later[:4]) and not moved(network.blocks[1], later[4:])
    old = weights(network.to_rgb[0])  # faded out
    for _ in range(4):
        iterate(live)
    assert not moved(network.to_rgb[0], old)


def test_optimizers_begin_anew_with_each_level_and_at_no_other_time():
    live, counts = started(), []
    for _ in range(13):
        iterate(live)
        moments = live.players["discriminator"].shared.moments()
        assert len({int(v) for k, v in moments.items() if k.endswith("/step")}) == 1
        counts.append(int(moments["last.conv.weight/step"]))
    assert counts == [1, 2, 1, 2, 3, 4, 5, 6, 2, 4, 6, 8, 10]  # two updates in the last level's


def test_a_rehearsal_leaves_the_optimizers_alone():
    live = started()
    iterate(live)
    live.clock.seek(SHORT["stable_steps"] * BATCH)
    with live.rehearsing():
        iterate(live)
    assert int(live.players["generator"].shared.moments()["first.bias/step"]) == 1


def test_a_run_killed_while_a_level_comes_in_goes_on_bit_for_bit(tmp_path):
    flags = [*toy("progan_celeba", BATCH)[1], "--data.resolution", "16", *QUICK]
    flags += ["--stable-steps", "2", "--fade-steps", "3", "--updates", "1", "1", "2"]
    flags += ["--precision", "fp32", "--compile", "off", "--runs", str(tmp_path)]
    train("progan_celeba", *flags, "--steps", "9", "--run", "whole")
    often = ["--checkpoint-every", str(BATCH / 1000), "--keep", "10000", "--steps", "3000"]
    killed = tmp_path / "progan_celeba" / "killed"
    run = Run("progan_celeba", *flags, *often, "--run", "killed")
    kill_once_at(killed, 4 * BATCH, run)  # the second level came at 2, the third comes at 7
    train("progan_celeba", *flags, "--steps", "9", "--run", "killed")
    whole = final_state(tmp_path / "progan_celeba" / "whole")
    assert not differences(whole, final_state(killed))
    assert int(whole["generator/network/growth"]) > STEPS


def test_two_ranks_equal_one_where_a_level_takes_parts_of_the_batch(tmp_path):
    flags = [*toy("progan_celeba", 16)[1], "--data.resolution", "8", *QUICK, "--updates", "1", "2"]
    flags += ["--stable-steps", "1", "--fade-steps", "2", "--steps", "4"]
    flags += ["--precision", "fp32", "--compile", "off"]
    flags += ["--generator.eps", "1e-3", "--discriminator.eps", "1e-3"]
    states = []
    for ranks in (1, 2):
        runs = tmp_path / str(ranks)
        train("progan_celeba", *flags, "--runs", str(runs), ranks=ranks)
        states.append(final_state(run_folder(runs, "progan_celeba")))
    one, two = states
    for path, value in one.items():
        turned = 0.03 * float(value.abs().max()) if "/optimizer/" in path else 0.0
        torch.testing.assert_close(two[path], value, rtol=1e-3, atol=2e-5 + turned, msg=path)


# parts of the batch


def test_parts_are_made_of_groups_and_are_those_of_one_rank_on_two():
    whole = [set(part.tolist()) for part in parts_of(Clock(32, CPU), 2, 1)]
    assert whole[0] == {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}
    for wanted, number in zip(whole, range(2), strict=True):
        seen = set()
        for rank in range(2):
            part = parts_of(Clock(32, CPU, rank=rank, world_size=2), 2, 1)[number]
            seen |= {rank * 16 + place for place in part.tolist()}
        assert seen == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": (1, 1)}, "--updates has 2 numbers, but there are 3 levels"),
        ({"updates": (1, 1, 3)}, "data.batch=8 does not divide into 3 updates"),
        ({"updates": (1, 0, 1)}, "--updates must be at least 1"),
        ({"fade_steps": 0}, "--fade-steps"),
        ({"gp": 0.0}, "--gp 0.0 must be positive"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        started(**changes)


def test_a_batch_that_ranks_and_micro_batches_cannot_part_is_refused():
    with pytest.raises(ValueError, match=r"try --data\.batch 16"):
        parts_of(Clock(8, CPU, world_size=2), 4, 2)
