"""Transformer over the words of a caption and then the codes of an image: DALL-E, small.

Ramesh et al. 2021, "Zero-shot text-to-image generation", https://arxiv.org/abs/2102.12092, section
2.2 and appendix B: one stream of text and image tokens, each place of which sees itself and those
before it; every place of the text that has no word has a padding token of its own; codes have an
embedding of their row and one of their column. Here all layers attend to all of these, and a
learned vector stands before the first word, which is predicted from it.

Layers are normalised at their beginning and weights are begun as in Radford et al. 2019, "Language
models are unsupervised multitask learners", section 2.3.

Shapes: N batch, L words of a caption, V different words with the paddings, M codes of an image, K
codes of the codebook, S = L + M places, T of these that go through together, W width, H heads, E
width of a head, B blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network

WORDS = 18
"""Words of a caption (L)."""
STD = 0.02
LEAST = 2.0**-40


class Block(nn.Module):
    """Attention to the places before and a perceptron, each beside what goes past it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_NTW: Tensor, kept_2NHSE: Tensor | None = None, at: int = 0) -> Tensor:
        """Of the input's shape: T places, which are the first ones (at 0) or, with what is kept of
        those before it, a single one. kept: keys and values, to which those of x are added."""
        split = self.query_key_value(self.before_attention(x_NTW)).unflatten(2, (3, self.heads, -1))
        query_NHTE, key_NHTE, value_NHTE = split.permute(2, 0, 3, 1, 4)
        places = x_NTW.shape[1]
        if kept_2NHSE is not None:
            now = slice(at, at + places)
            kept_2NHSE[0, :, :, now], kept_2NHSE[1, :, :, now] = key_NHTE, value_NHTE
            key_NHTE, value_NHTE = kept_2NHSE[:, :, :, : at + places].to(query_NHTE.dtype)
        found_NHTE = F.scaled_dot_product_attention(
            query_NHTE, key_NHTE, value_NHTE, is_causal=places > 1
        )
        x_NTW = x_NTW + self.joined(found_NHTE.transpose(1, 2).flatten(2))
        return x_NTW + self.perceptron(self.before_perceptron(x_NTW))


class Transformer(nn.Module):
    """p(word | words before) and p(code | caption, codes before), codes in raster order."""

    def __init__(self, width: int, depth: int, heads: int, words: int, codes: int, side: int):
        super().__init__()
        self.words, self.side = words, side
        self.start_W = nn.Parameter(torch.empty(width))
        self.text = nn.Embedding(words + WORDS, width)
        self.place_LW = nn.Parameter(torch.empty(WORDS, width))
        self.code = nn.Embedding(codes, width)
        self.row_W = nn.Parameter(torch.empty(side, 1, width))
        self.column_W = nn.Parameter(torch.empty(1, side, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.to_text = nn.Linear(width, words + WORDS)
        self.to_code = nn.Linear(width, codes)
        self._begin()

    def _begin(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for parameter in (self.start_W, self.place_LW, self.row_W, self.column_W):
            nn.init.normal_(parameter, std=STD)
        for block in self.blocks:  # 2 B of them are added up
            for layer in (block.joined, block.perceptron[-1]):
                nn.init.normal_(layer.weight, std=STD / (2 * len(self.blocks)) ** 0.5)

    @property
    def codes(self) -> int:
        """Codes of an image (M)."""
        return self.side**2

    def padded(self, tokens_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """The words' numbers, int64 (N, L), with the padding of each place that has none."""
        place_L = torch.arange(WORDS, device=tokens_NL.device)
        return torch.where(place_L < lengths_N[:, None], tokens_NL, self.words + place_L)

    def _prompt(self, tokens_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """The start and the words, (N, 1 + L, W)."""
        text_NLW = self.text(self.padded(tokens_NL, lengths_N)) + self.place_LW
        return torch.cat([self.start_W.expand(len(text_NLW), 1, -1), text_NLW], 1)

    def _places(self) -> Tensor:
        """Of the codes, (M, W)."""
        return (self.row_W + self.column_W).flatten(0, 1)

    def forward(
        self, tokens_NL: Tensor, lengths_N: Tensor, code_NM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of each word, (N, L, V), and of each code, (N, M, K), given those before it."""
        image_NMW = self.code(code_NM) + self._places()
        x_NSW = torch.cat([self._prompt(tokens_NL, lengths_N), image_NMW[:, :-1]], 1)
        for block in self.blocks:
            x_NSW = block(x_NSW)
        x_NSW = self.last(x_NSW)
        return self.to_text(x_NSW[:, :WORDS]), self.to_code(x_NSW[:, WORDS:])

    def generate(
        self,
        tokens_NL: Tensor,
        lengths_N: Tensor,
        u_NM: Tensor,
        temperature: float = 1.0,
        top: int = 0,
    ) -> Tensor:
        """Codes of captions, int64 (N, M), each by its own uniform number in [0, 1)."""
        x_NTW, places_MW = self._prompt(tokens_NL, lengths_N), self._places()
        kept_B2NHSE = self._room(x_NTW)
        code_NM = tokens_NL.new_empty(u_NM.shape)
        at = 0
        for i in range(self.codes):
            logits_NK = self._next(x_NTW, kept_B2NHSE, at)
            code_NM[:, i] = drawn(logits_NK, u_NM[:, i], temperature, top)
            at += x_NTW.shape[1]
            x_NTW = (self.code(code_NM[:, i]) + places_MW[i])[:, None]
        return code_NM

    def _room(self, x_NTW: Tensor) -> Tensor:
        """For the keys and values of all places, made once, (B, 2, N, H, S, E)."""
        heads = self.blocks[0].heads
        shape = (len(x_NTW), heads, WORDS + self.codes, x_NTW.shape[2] // heads)
        return x_NTW.new_empty(len(self.blocks), 2, *shape)

    def _next(self, x_NTW: Tensor, kept_B2NHSE: Tensor, at: int) -> Tensor:
        """Logits (N, K) of the code after these places, the first of which is `at`."""
        for block, kept_2NHSE in zip(self.blocks, kept_B2NHSE, strict=True):
            x_NTW = block(x_NTW, kept_2NHSE, at)
        return self.to_code(self.last(x_NTW[:, -1])).float()


def drawn(logits_NK: Tensor, u_N: Tensor, temperature: float, top: int) -> Tensor:
    """Codes, int64 (N,), by the inverse of their distribution function at u, of logits divided by
    the temperature; of the `top` likeliest alone where top is not 0 (and of what is as likely as
    the last of these)."""
    if top:
        least_N1 = logits_NK.topk(min(top, logits_NK.shape[1])).values[:, -1:]
        logits_NK = logits_NK.masked_fill(logits_NK < least_N1, -torch.inf)
    below_NK = (logits_NK / temperature).softmax(1).cumsum(1)
    # above 0, and a share of the last sum, which rounding keeps from 1: so no code without a share
    goal_N1 = u_N.clamp(min=LEAST)[:, None] * below_NK[:, -1:]
    return (below_NK < goal_N1).sum(1)


@dataclass(frozen=True)
class TextAndCodes(Network):
    """Sizes of the transformer."""

    width: int = 256
    """Numbers of a place."""
    depth: int = 6
    """Blocks of attention and perceptron."""
    heads: int = 8
    """Of the attention; they share the width."""
    codes: int = 512
    """Entries of the codebook (K), those of the autoencoder."""
    halvings: int = 2
    """Of the image to the map of codes, those of the autoencoder."""
    words: int = 5450
    """Different words of the captions that there is room for, their end included: 5,450 are those
    of CUB-200-2011."""

    def build(self, images: ImageSpec) -> nn.Module:
        if self.width % self.heads:
            raise ValueError(
                f"--transformer.width {self.width} is not a multiple of --transformer.heads "
                f"{self.heads}"
            )
        side = images.resolution // 2**self.halvings
        return Transformer(self.width, self.depth, self.heads, self.words, self.codes, side)
