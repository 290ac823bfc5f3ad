"""DAMSM: what its encoders make of captions and images, its losses, and R-precision."""

import math

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import damsm
from engine.damsm import Features, Sharpness
from engine.networks.damsm import Encoders, Inception, read_inception, resized
from engine.networks.spec import ImageSpec
from engine.networks.text import TextEncoder
from engine.steps.matching import matching_losses, matching_update
from engine.world import Ranks
from kernels import philox

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
SIZES = Encoders(words=30, vector=12, features=8, width=4, side=16)
T = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captions(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens_NT = torch.randint(1, 30, (count, T), generator=random)
    lengths_N = torch.randint(1, T + 1, (count,), generator=random)
    lengths_N[0], lengths_N[-1] = 1, T
    return tokens_NT * (torch.arange(T) < lengths_N[:, None]), lengths_N


# the text encoder


def packed(encoder: TextEncoder, tokens_NT: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """What torch's LSTM makes of packed sequences, with the encoder's weights."""
    features = 2 * encoder.state_2HG.shape[1]
    vector = encoder.vectors.embedding_dim
    lstm = nn.LSTM(vector, features // 2, batch_first=True, bidirectional=True).to(torch.float64)
    with torch.no_grad():
        for way, suffix in enumerate(("", "_reverse")):
            getattr(lstm, f"weight_ih_l0{suffix}").copy_(encoder.input_2EG[way].T)
            getattr(lstm, f"weight_hh_l0{suffix}").copy_(encoder.state_2HG[way].T)
            getattr(lstm, f"bias_ih_l0{suffix}").copy_(encoder.bias_21G[way, 0])
            getattr(lstm, f"bias_hh_l0{suffix}").zero_()
    given = nn.utils.rnn.pack_padded_sequence(
        encoder.vectors(tokens_NT), lengths_N, batch_first=True, enforce_sorted=False
    )
    out, (last_2NH, _) = lstm(given)
    words_NTD, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=T)
    return words_NTD, torch.cat([*last_2NH], 1)


def test_the_text_encoder_is_torchs_lstm_on_packed_captions():
    encoder = TextEncoder(30, 12, 8, 0.5).double()
    tokens_NT, lengths_N = captions(7)
    for ours, theirs in zip(
        encoder(tokens_NT, lengths_N), packed(encoder, tokens_NT, lengths_N), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_fills_a_caption_reaches_no_word_of_it():
    encoder = TextEncoder(30, 12, 8, 0.5)
    tokens_NT, lengths_N = captions(7)
    other_NT = torch.where(torch.arange(T) < lengths_N[:, None], tokens_NT, 7)
    assert not torch.equal(tokens_NT, other_NT)
    for a, b in zip(encoder(tokens_NT, lengths_N), encoder(other_NT, lengths_N), strict=True):
        assert torch.equal(a, b)


def test_half_of_the_words_vectors_is_dropped_and_the_rest_doubled(monkeypatch):
    encoder, seen = TextEncoder(30, 12, 8, 0.5), []
    monkeypatch.setattr(encoder, "_states", lambda x: seen.append(x) or x.new_zeros(2, 7, T, 4))
    tokens_NT, lengths_N = captions(7)
    key = philox.make_key(0)
    uniform_NM = philox.uniform(key, 1, torch.arange(7), encoder.draws(T))
    encoder(tokens_NT, lengths_N, uniform_NM)
    share = seen[0][0] / encoder.vectors(tokens_NT)
    assert set(share.round(decimals=4).flatten().tolist()) == {0.0, 2.0}
    assert 0.4 < (share > 1).float().mean() < 0.6


# the image encoder


@pytest.mark.parametrize("resolution", [16, 24, 40, 64])
def test_regions_are_as_many_as_the_sizes_say(resolution):
    both = SIZES.build(ImageSpec(3, resolution))
    regions_NDhw, whole_ND = both.image(noise(2, 3, resolution, resolution))
    assert regions_NDhw.flatten(2).shape == (2, 8, SIZES.regions(resolution))
    assert whole_ND.shape == (2, 8)


def test_resizing_by_products_is_bilinear_interpolation():
    x_NCHW = noise(2, 3, 10, 7)
    for side in (5, 23):
        expected = F.interpolate(x_NCHW, (side, side), mode="bilinear")
        torch.testing.assert_close(resized(x_NCHW, side), expected)


@pytest.fixture(scope="module")
def inception() -> Encoders:
    return Encoders(words=30, vector=12, features=8, inception=True)


@pytest.mark.slow
def test_inceptions_weights_are_read_and_stay(inception, tmp_path):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    theirs = inception_v3(weights=None, init_weights=False).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "inception.safetensors")
    both = inception.build(ImageSpec(3, 64)).train()
    read_inception(both, tmp_path / "inception.safetensors")
    seen: dict[str, Tensor] = {}
    theirs.Mixed_6e.register_forward_hook(lambda *a: seen.update(regions=a[2]))
    theirs.avgpool.register_forward_hook(lambda *a: seen.update(whole=a[2]))
    x_NCHW = noise(1, 3, 299, 299)
    with torch.no_grad():
        theirs(x_NCHW)
        regions_NCHW, whole_NCHW = both.image.seen(x_NCHW)
    torch.testing.assert_close(regions_NCHW, seen["regions"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole_NCHW.mean((2, 3)), seen["whole"][:, :, 0, 0])
    assert not any(p.requires_grad for p in both.image.seen.parameters())
    assert inception.regions(64) == regions_NCHW.shape[2] * regions_NCHW.shape[3] == 17**2


@pytest.mark.slow
def test_another_file_than_inceptions_is_named(inception, tmp_path):
    both, path = inception.build(ImageSpec(3, 64)), tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=r"--inception .*other\.safetensors: there is no such"):
        read_inception(both, path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not Inception-v3's"):
        read_inception(both, path)
    assert isinstance(both.image.seen, Inception)


# the losses


def by_hand(f: Features, sharp: Sharpness) -> tuple[float, float]:
    """Equations 7 to 13 word by word, in float64."""
    count = len(f.whole_ND)
    words, sentences = torch.zeros(count, count), torch.zeros(count, count)
    words, sentences = words.double(), sentences.double()
    for i in range(count):
        for m in range(count):
            length = int(f.lengths_N[m])
            e_TD, v_DR = f.words_NTD[m, :length], f.regions_NDR[i]
            s_TR = torch.exp(e_TD @ v_DR)
            s_TR = s_TR / s_TR.sum(0, keepdim=True)
            total = 0.0
            for t in range(length):
                a_R = torch.exp(sharp.regions * s_TR[t])
                c_D = v_DR @ (a_R / a_R.sum())
                alike = float(c_D @ e_TD[t] / (c_D.norm() * e_TD[t].norm()))
                total += math.exp(sharp.words * alike)
            words[i, m] = math.log(total)
            a, b = f.whole_ND[i], f.sentence_ND[m]
            sentences[i, m] = a @ b / (a.norm() * b.norm())
    found = []
    for scores in (words, sentences):
        loss = 0.0
        for i in range(count):
            rivals = [j for j in range(count) if j == i or f.labels_N[i] != f.labels_N[j]]
            right = math.exp(sharp.captions * scores[i, i])
            loss -= math.log(right / sum(math.exp(sharp.captions * scores[i, j]) for j in rivals))
            loss -= math.log(right / sum(math.exp(sharp.captions * scores[j, i]) for j in rivals))
        found.append(loss / count)
    return tuple(found)


def features(count: int = 5, dtype: torch.dtype = torch.float64) -> Features:
    _, lengths_N = captions(count)
    words_NTD = noise(count, T, 8, seed=1) * (torch.arange(T) < lengths_N[:, None])[:, :, None]
    parts = (noise(count, 8, 9), noise(count, 8, seed=2), words_NTD, noise(count, 8, seed=3))
    labels_N = torch.tensor([0, 1, 0, 2, 1])[:count]
    return Features(*(part.to(dtype) for part in parts), lengths_N, labels_N)


def test_the_losses_are_the_papers_equations():
    f = features()
    found = [float(loss) for loss in damsm.losses(f, Sharpness())]
    assert found == pytest.approx(by_hand(f, Sharpness()), rel=1e-10)


def test_their_gradients_are_finite_where_captions_are_filled():
    f = features()
    for part in (f.regions_NDR, f.whole_ND, f.words_NTD, f.sentence_ND):
        part.requires_grad_()
    sum(damsm.losses(f, Sharpness())).backward()
    for part in (f.regions_NDR, f.whole_ND, f.words_NTD, f.sentence_ND):
        assert part.grad.isfinite().all() and part.grad.any()
    assert not f.words_NTD.grad[0, 1:].any()  # its caption has one word


def test_what_fills_captions_has_no_part_in_the_loss():
    f = features()
    before = damsm.losses(f, Sharpness())
    f.words_NTD[0, 1:] = 3.0
    assert all(torch.equal(a, b) for a, b in zip(before, damsm.losses(f, Sharpness()), strict=True))


def test_losses_are_float32_under_autocast():
    f = features(dtype=torch.float32)
    seen, read = (f.regions_NDR[..., None], f.whole_ND), (f.words_NTD, f.sentence_ND)
    plain = matching_losses(seen, read, f.lengths_N, f.labels_N, ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        halves = matching_losses(seen, read, f.lengths_N, f.labels_N, ALONE)
    for name, value in plain.items():
        assert halves[name].dtype == torch.float32
        assert torch.equal(halves[name], value)


@pytest.mark.slow
def test_the_update_compiles_to_one_graph():
    both = SIZES.build(ImageSpec(3, 32)).train()
    tokens_NT, lengths_N = captions(4)
    given = (noise(4, 3, 32, 32), tokens_NT, lengths_N, torch.arange(4))
    args = (*given, philox.make_key(0), torch.arange(4))

    def loss(*inner):
        return matching_update(*inner, ranks=ALONE)

    expected = loss(both, *args)[0]
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(both, *args)[0], expected, rtol=1e-4, atol=1e-4)


# R-precision


def precision_by_hand(whole_ND: Tensor, sentence_ND: Tensor, labels_N: Tensor) -> tuple:
    count, right, chance = len(whole_ND), 0.0, 0.0
    for i in range(count):
        others = [(i + k) % count for k in range(1, count)]
        others = [j for j in others if labels_N[j] != labels_N[i]][:99]
        own = F.cosine_similarity(whole_ND[i], sentence_ND[i], dim=0)
        right += all(F.cosine_similarity(whole_ND[i], sentence_ND[j], dim=0) < own for j in others)
        chance += 1 / (1 + len(others))
    return right / count, chance / count


@pytest.mark.parametrize("count", [20, 130])
def test_r_precision_is_that_of_a_loop(count):
    sentence_ND = noise(count, 4).double()
    whole_ND = sentence_ND + 0.4 * noise(count, 4, seed=1)
    labels_N = torch.arange(count) % 5
    found = damsm.r_precision(whole_ND, sentence_ND, labels_N)
    expected = precision_by_hand(whole_ND, sentence_ND, labels_N)
    assert (found["r_precision"], found["r_precision_chance"]) == pytest.approx(expected)
    assert 0.1 < expected[0] < 0.9


def test_r_precision_of_what_says_nothing_is_that_of_chance():
    same_ND, labels_N = torch.ones(12, 4).double(), torch.arange(12) % 3
    found = damsm.r_precision(same_ND, same_ND, labels_N)
    assert (
        found["r_precision"] == pytest.approx(found["r_precision_chance"]) == pytest.approx(1 / 9)
    )
    assert damsm.r_precision(same_ND, same_ND, None)["r_precision"] == pytest.approx(1 / 12)
