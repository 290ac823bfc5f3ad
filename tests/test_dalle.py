"""DALL-E's transformer: its order, its cache, its draws; what it begins with."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from engine.describe import parameters
from engine.networks.dalle import WORDS, TextAndCodes, Transformer, drawn
from engine.networks.spec import ImageSpec
from pipelines import captions

K, SIDE, V = 11, 3, 7
M = SIDE**2


def small(double: bool = False) -> Transformer:
    """With weights large enough that places matter."""
    torch.manual_seed(0)
    sizes = TextAndCodes(width=24, depth=3, heads=4, codes=K, halvings=2, words=V)
    network = sizes.build(ImageSpec(3, SIDE * 4)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return network.double() if double else network


def example(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(1, WORDS + 1, (count,), generator=noise)
    tokens_NL = torch.randint(0, V, (count, WORDS), generator=noise)
    return tokens_NL, lengths_N, torch.randint(0, K, (count, M), generator=noise)


def test_a_caption_is_as_long_as_the_pipelines_make_it():
    assert WORDS == captions.LENGTH


def test_sizes_are_those_of_the_settings():
    network = TextAndCodes(words=100).build(ImageSpec(3, 64))
    block = (256 * 768 + 768) + (256 * 256 + 256) + (256 * 1024 + 1024) + (1024 * 256 + 256) + 1024
    text, code = (118 * 256) + (256 * 118 + 118), (512 * 256) + (256 * 512 + 512)
    places = 256 * (1 + 18 + 16 + 16)
    assert parameters(network) == 6 * block + text + code + places + 512
    assert network.codes == 16 * 16
    with pytest.raises(ValueError, match="width 20 is not a multiple"):
        TextAndCodes(width=20).build(ImageSpec(3, 64))


def test_a_place_without_a_word_has_a_padding_of_its_own():
    network, (tokens_NL, lengths_N, code_NM) = small(), example()
    lengths_N[0] = 4
    padded_NL = network.padded(tokens_NL, lengths_N)
    assert padded_NL[0, :4].tolist() == tokens_NL[0, :4].tolist()
    assert padded_NL[0, 4:].tolist() == [V + i for i in range(4, WORDS)]
    other_NL = tokens_NL.clone()
    other_NL[0, 4:] = (other_NL[0, 4:] + 1) % V  # what stands there is nothing
    for a, b in zip(
        network(tokens_NL, lengths_N, code_NM), network(other_NL, lengths_N, code_NM), strict=True
    ):
        assert torch.equal(a, b)


def test_a_later_place_changes_nothing_before_it():
    """To the last bit in the places before, and something in those after."""
    network, (tokens_NL, lengths_N, code_NM) = small(), example()
    lengths_N[:] = WORDS
    text_NLV, code_NMK = network(tokens_NL, lengths_N, code_NM)
    assert text_NLV.shape == (3, WORDS, V + WORDS) and code_NMK.shape == (3, M, K)
    for place in range(WORDS):
        other_NL = tokens_NL.clone()
        other_NL[:, place] = (other_NL[:, place] + 1) % V
        text, code = network(other_NL, lengths_N, code_NM)
        assert torch.equal(text[:, : place + 1], text_NLV[:, : place + 1])
        assert (text[:, place + 1 :] != text_NLV[:, place + 1 :]).any(2).all()
        assert (code != code_NMK).any(2).all()
    for place in range(M):
        other_NM = code_NM.clone()
        other_NM[:, place] = (other_NM[:, place] + 1) % K
        text, code = network(tokens_NL, lengths_N, other_NM)
        assert torch.equal(text, text_NLV)
        assert torch.equal(code[:, : place + 1], code_NMK[:, : place + 1])
        assert (code[:, place + 1 :] != code_NMK[:, place + 1 :]).any(2).all()


def by_hand(network: Transformer, tokens_L: list[int], code_M: list[int]) -> list[Tensor]:
    """What comes out at each place, one place at a time by loops, float64; all L are words."""
    rows = [network.start_W]
    rows += [network.text.weight[t] + network.place_LW[i] for i, t in enumerate(tokens_L)]
    for i, code in enumerate(code_M[:-1]):
        row, column = network.row_W[i // SIDE, 0], network.column_W[0, i % SIDE]
        rows.append(network.code.weight[code] + row + column)
    for block in network.blocks:
        parts = [block.query_key_value(block.before_attention(x)).split(24) for x in rows]
        after = []
        for at, x in enumerate(rows):
            heads = []
            for h in range(4):
                own = slice(6 * h, 6 * h + 6)
                query = parts[at][0][own]
                scores = [float(query @ parts[j][1][own]) / math.sqrt(6) for j in range(at + 1)]
                shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
                heads.append(sum(shares[j] * parts[j][2][own] for j in range(at + 1)))
            x = x + block.joined(torch.cat(heads))
            after.append(x + block.perceptron(block.before_perceptron(x)))
        rows = after
    return [network.last(x) for x in rows]


def test_logits_are_those_by_hand():
    network, (tokens_NL, _, code_NM) = small(double=True), example(1)
    with torch.no_grad():
        text_NLV, code_NMK = network(tokens_NL, torch.tensor([WORDS]), code_NM)
        rows = by_hand(network, tokens_NL[0].tolist(), code_NM[0].tolist())
        text = torch.stack([network.to_text(x) for x in rows[:WORDS]])
        code = torch.stack([network.to_code(x) for x in rows[WORDS:]])
    torch.testing.assert_close(text_NLV[0], text)
    torch.testing.assert_close(code_NMK[0], code)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole():
    network, (tokens_NL, lengths_N, code_NM) = small(), example()
    _, wanted_NMK = network(tokens_NL, lengths_N, code_NM)
    x_NTW, places_MW = network._prompt(tokens_NL, lengths_N), network._places()
    kept, at = network._room(x_NTW), 0
    address, found = kept.data_ptr(), []
    for i in range(M):
        found.append(network._next(x_NTW, kept, at))
        at += x_NTW.shape[1]
        x_NTW = (network.code(code_NM[:, i]) + places_MW[i])[:, None]
    assert kept.data_ptr() == address and at == WORDS + M
    torch.testing.assert_close(torch.stack(found, 1), wanted_NMK, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_codes_are_drawn_each_given_those_before_it():
    """The same codes as by a whole pass for each, and none depends on its neighbours in a batch."""
    network, (tokens_NL, lengths_N, _) = small(), example(4)
    u_NM = torch.rand(4, M, generator=torch.Generator().manual_seed(1))
    code_NM = network.generate(tokens_NL, lengths_N, u_NM, 0.8, 5)
    assert code_NM.shape == (4, M) and code_NM.dtype == torch.int64
    whole_NM = torch.zeros_like(code_NM)
    for i in range(M):
        logits_NK = network(tokens_NL, lengths_N, whole_NM)[1][:, i]
        whole_NM[:, i] = drawn(logits_NK, u_NM[:, i], 0.8, 5)
    assert torch.equal(code_NM, whole_NM)
    alone = [
        network.generate(*(v[n : n + 1] for v in (tokens_NL, lengths_N, u_NM)), 0.8, 5)
        for n in range(4)
    ]
    assert torch.equal(torch.cat(alone), code_NM)
    assert len(code_NM.unique()) > 3


def test_draws_have_the_distribution_of_the_logits():
    logits_NK = torch.randn(1, K, generator=torch.Generator().manual_seed(2))
    u_N = (torch.arange(100_000) + 0.5) / 100_000
    for temperature, top in ((1.0, 0), (0.5, 0), (2.0, 4), (1.0, 1), (1.0, 10 * K)):
        code_N = drawn(logits_NK.expand(len(u_N), K), u_N, temperature, top)
        share_K = torch.bincount(code_N, minlength=K).double() / len(u_N)
        kept = logits_NK[0].double() / temperature
        likeliest = kept.argsort(descending=True)[: top or K]
        wanted_K = torch.zeros(K, dtype=torch.float64)
        wanted_K[likeliest] = kept[likeliest].softmax(0)
        torch.testing.assert_close(share_K, wanted_K, rtol=0, atol=2e-5)


def test_the_ends_of_the_uniform_numbers_draw_no_code_without_a_share():
    logits_NK = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]).expand(2, 4)
    assert drawn(logits_NK, torch.tensor([0.0, 1.0]), 1.0, 0).tolist() == [1, 2]
    assert drawn(logits_NK, torch.tensor([0.0, 1.0]), 1.0, 1).tolist() == [2, 2]


def test_it_begins_knowing_nothing():
    """With codes about as likely as each other, and blocks that add little."""
    torch.manual_seed(0)
    network = TextAndCodes(words=50).build(ImageSpec(3, 32)).eval()
    tokens_NL = torch.randint(0, 50, (2, WORDS))
    code_NM = torch.randint(0, 512, (2, 64))
    text_NLV, code_NMK = network(tokens_NL, torch.tensor([5, 18]), code_NM)
    for logits in (text_NLV, code_NMK):
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        assert (math.log(logits.shape[-1]) - entropy).abs().max() < 0.1


def test_what_is_compiled_is_one_graph():
    network, given = small(), example()
    whole = torch.compile(
        copy.deepcopy(network), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    for a, b in zip(whole(*given), network(*given), strict=True):
        torch.testing.assert_close(a, b)
    assert isinstance(network.blocks, nn.ModuleList)
