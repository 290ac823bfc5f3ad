"""PixelRNN with Row LSTM layers: the probability of each pixel given those before it.

van den Oord, Kalchbrenner and Kavukcuoglu 2016, "Pixel recurrent neural networks", section 3 and
table 1: a 7x7 convolution with mask A, Row LSTM layers with residual connections, then ReLU and 1x1
convolutions; for binary pixels of one channel. A mask leaves some taps of a kernel, and only those
are kept as parameters: of mask A the three rows above and the three pixels to the left, of the 3x1
input-to-state kernel with mask B the pixel itself and its left neighbour.

A layer needs of the layer below the same row, and of itself the row above. So at time t layer l
computes row t - l, all layers at once: H + L - 1 batched steps in place of H * L small ones.

Shapes: N batch, H height, W width, L layers, F features (2h), D hidden units (h), G gates (4h),
K taps times features.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.networks.spec import ImageSpec, Network

REACH = 3  # of the 7x7 kernel


def with_neighbours(x_LNWF: Tensor, left: int, right: int) -> Tensor:
    """Each place beside its neighbours in the row, zeros beyond its ends, (L, N * W, K)."""
    width = x_LNWF.shape[2]
    padded = F.pad(x_LNWF, (0, 0, left, right))
    shifts = [padded[:, :, k : k + width] for k in range(left + right + 1)]
    return torch.cat(shifts, dim=3).flatten(1, 2)


def lstm(gates_G: Tensor, cell_D: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state from the gates o, f, i, g before their squashing (equation 3); any axes
    may come before the last."""
    size = cell_D.shape[-1]
    output, forget, write = gates_G[..., : 3 * size].sigmoid().chunk(3, dim=-1)
    cell_D = forget * cell_D + write * gates_G[..., 3 * size :].tanh()
    return output * cell_D.tanh(), cell_D


@torch.compiler.nested_compile_region
def step(
    x_LNWF: Tensor,
    hidden_LNWD: Tensor,
    cell_LNWD: Tensor,
    gates_LKG: Tensor,
    bias_L1G: Tensor,
    up_LDF: Tensor,
    up_bias_L1F: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One row of every layer: output (L, N, W, F), hidden and cell state.

    A region of its own to torch.compile, which compiles it once and not for each of the times that
    it is unrolled: 104 s in place of more than 240 on a busy CPU core, forward and backward.
    """
    seen = [with_neighbours(x_LNWF, 1, 0), with_neighbours(hidden_LNWD, 1, 1)]
    gates = torch.baddbmm(bias_L1G, torch.cat(seen, dim=2), gates_LKG)
    hidden_LNWD, cell_LNWD = lstm(gates.unflatten(1, x_LNWF.shape[1:3]), cell_LNWD)
    up = torch.baddbmm(up_bias_L1F, hidden_LNWD.flatten(1, 2), up_LDF)
    return x_LNWF + up.unflatten(1, x_LNWF.shape[1:3]), hidden_LNWD, cell_LNWD


class RowLSTM(nn.Module):
    """A stack of Row LSTM layers with residual connections; its parameters' first axis is L."""

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = layers
        self.input_to_state_LKG = _weight(layers, 2 * 2 * hidden, 4 * hidden)
        self.state_to_state_LKG = _weight(layers, 3 * hidden, 4 * hidden)
        self.bias_L1G = nn.Parameter(torch.zeros(layers, 1, 4 * hidden))
        self.up_LDF = _weight(layers, hidden, 2 * hidden)
        self.up_bias_L1F = nn.Parameter(torch.zeros(layers, 1, 2 * hidden))
        self.first_hidden_L11D = nn.Parameter(torch.zeros(layers, 1, 1, hidden))
        self.first_cell_L11D = nn.Parameter(torch.zeros(layers, 1, 1, hidden))

    def first_state(self, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Hidden and cell state above the first row, learned, (L, N, W, D) each."""
        shape = (1, count, width, 1)
        return self.first_hidden_L11D.repeat(shape), self.first_cell_L11D.repeat(shape)

    def forward(self, x_NHWF: Tensor) -> Tensor:
        """Features after the last layer, (N, H, W, F)."""
        count, height, width, _ = x_NHWF.shape
        before = self.layers - 1  # times that the last layer waits for its first row
        # whatever a layer computes before its first row and after its last one is dropped
        x_TNWF = F.pad(x_NHWF.movedim(1, 0), (0, 0, 0, 0, 0, 0, 0, before))
        gates_LKG = torch.cat([self.input_to_state_LKG, self.state_to_state_LKG], dim=1)
        weights = (gates_LKG, self.bias_L1G, self.up_LDF, self.up_bias_L1F)
        hidden, cell = first_hidden, first_cell = self.first_state(count, width)
        out_LNWF = torch.zeros_like(x_TNWF[: self.layers])
        done: list[Tensor] = []
        for t in range(height + before):
            x_LNWF = torch.cat([x_TNWF[t : t + 1], out_LNWF[:-1]])
            out_LNWF, hidden, cell = step(x_LNWF, hidden, cell, *weights)
            if t < before:
                hidden = torch.cat([hidden[: t + 1], first_hidden[t + 1 :]])
                cell = torch.cat([cell[: t + 1], first_cell[t + 1 :]])
            else:
                done.append(out_LNWF[-1])
        return torch.stack(done, dim=1)

    def from_above(self, hidden_LNWD: Tensor) -> Tensor:
        """What the row above gives to the gates of a row, with the bias, (L, N, W, G)."""
        above = with_neighbours(hidden_LNWD, 1, 1)
        gates = torch.baddbmm(self.bias_L1G, above, self.state_to_state_LKG)
        return gates.unflatten(1, hidden_LNWD.shape[1:3])


def _weight(layers: int, inputs: int, outputs: int) -> nn.Parameter:
    """Uniform between +-1 / sqrt(inputs), as nn.Linear has it."""
    return nn.Parameter(torch.empty(layers, inputs, outputs).uniform_(-1, 1) / inputs**0.5)


class Pixels(nn.Module):
    """p(pixel is white | the pixels before it in raster order)."""

    def __init__(self, resolution: int, layers: int, hidden: int, head: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.above = nn.Conv2d(1, 2 * hidden, (REACH, 2 * REACH + 1))
        self.left = nn.Conv2d(1, 2 * hidden, (1, REACH), bias=False)
        self.rows = RowLSTM(layers, hidden)
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Linear(2 * hidden, head),
            nn.ReLU(),
            nn.Linear(head, head),
            nn.ReLU(),
            nn.Linear(head, 1),
        )

    def forward(self, x_N1HW: Tensor) -> Tensor:
        """Logits (N, 1, H, W) of each pixel being white, for images in [-1, 1]."""
        width = x_N1HW.shape[3]
        padded = F.pad(x_N1HW, (REACH, REACH, REACH, 0))
        above_NFHW = self.above(padded[:, :, :-1])
        left_NFHW = self.left(padded[:, :, REACH:, : width + REACH - 1])
        features_NHWF = (above_NFHW + left_NFHW).permute(0, 2, 3, 1).to(x_N1HW.dtype)
        return self.head(self.rows(features_NHWF)).permute(0, 3, 1, 2).to(x_N1HW.dtype)


class Sampler(nn.Module):
    """Draws images pixel by pixel, each by the inverse of its distribution function: a pixel is
    white where Phi(z) < p, z being its own standard normal number."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, z_NL: Tensor) -> Tensor:
        """Images (N, 1, H, W) of -1 and 1 from latents of H * W numbers in raster order.

        An infinite number fixes its pixel: minus infinity white, plus infinity black.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError("a sampler that goes pixel by pixel makes too large a graph")
        side, rows = self.pixels.resolution, self.pixels.rows
        z_NHW = z_NL.view(-1, side, side)
        u_NHW = torch.special.ndtr(z_NHW)
        canvas_NHW = z_NL.new_zeros(len(z_NL), side + REACH, side + 2 * REACH)
        hidden, cell = rows.first_state(len(z_NL), side)
        for row in range(side):
            hidden, cell = self._draw_row(canvas_NHW, row, u_NHW[:, row], hidden, cell)
        return canvas_NHW[:, None, REACH:, REACH:-REACH].contiguous()

    def _draw_row(
        self, canvas_NHW: Tensor, row: int, u_NW: Tensor, hidden_LNWD: Tensor, cell_LNWD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write a row of the canvas; hidden and cell states of that row.

        What the rows above give is computed once, and of the row itself one pixel at a time.
        """
        rows, width = self.pixels.rows, u_NW.shape[1]
        above_WNF = self.pixels.above(canvas_NHW[:, None, row : row + REACH])[:, :, 0].movedim(2, 0)
        gates_WLNG = rows.from_above(hidden_LNWD).movedim(2, 0)
        cells_WLND = cell_LNWD.movedim(2, 0)
        left_KF = self.pixels.left.weight.flatten(1).T
        left_LFG = rows.input_to_state_LKG.chunk(2, dim=1)[0]
        line_NW = canvas_NHW[:, row + REACH]
        inputs_LNF = above_WNF.new_zeros(rows.layers, *above_WNF.shape[1:])
        states = []
        for column in range(width):
            gates_LNG = torch.baddbmm(gates_WLNG[column], inputs_LNF, left_LFG)
            seen_NK = line_NW[:, column : column + REACH]
            x_NF = torch.addmm(above_WNF[column], seen_NK, left_KF)
            logit_N, inputs_LNF, state = self._pixel(x_NF, gates_LNG, cells_WLND[column])
            white_N = u_NW[:, column] < logit_N.sigmoid()
            line_NW[:, column + REACH] = white_N.to(line_NW) * 2 - 1
            states.append(state)
        return torch.stack([h for h, _ in states], 2), torch.stack([c for _, c in states], 2)

    def _pixel(
        self, x_NF: Tensor, gates_LNG: Tensor, cell_LND: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One pixel through all layers: its logit, each layer's input, and the states."""
        rows = self.pixels.rows
        here_LFG = rows.input_to_state_LKG.chunk(2, dim=1)[1]
        inputs, states = [], []
        for layer in range(rows.layers):
            inputs.append(x_NF)
            gates_NG = torch.addmm(gates_LNG[layer], x_NF, here_LFG[layer])
            states.append(lstm(gates_NG, cell_LND[layer]))
            up_NF = torch.addmm(rows.up_bias_L1F[layer], states[-1][0], rows.up_LDF[layer])
            x_NF = x_NF + up_NF
        hidden_LND, cell_LND = (torch.stack(values) for values in zip(*states, strict=True))
        return self.pixels.head(x_NF)[:, 0], torch.stack(inputs), (hidden_LND, cell_LND)


@dataclass(frozen=True)
class PixelRNN(Network):
    """Sizes of a PixelRNN for binary images."""

    layers: int = 7
    """Row LSTM layers."""
    hidden: int = 16
    """Units of a layer (h); twice as many features go from layer to layer."""
    head: int = 32
    """Features of the 1x1 convolutions after the layers."""

    def build(self, images: ImageSpec) -> nn.Module:
        if images.channels != 1:
            raise ValueError(
                f"data.channels={images.channels}: this network is for binary images; "
                f"give --data.channels 1"
            )
        return Pixels(images.resolution, self.layers, self.hidden, self.head)


@dataclass(frozen=True)
class Drawing(Network):
    """Sizes of what draws a PixelRNN's images from latent vectors, pixel by pixel."""

    traceable: ClassVar[bool] = False

    model: Network
    """Sizes of the PixelRNN."""

    def build(self, images: ImageSpec) -> nn.Module:
        return Sampler(self.model.build(images))
