"""How captions are read: a bidirectional LSTM over the vectors of their words.

Hochreiter and Schmidhuber 1997, with forget gates; Schuster and Paliwal 1997 for the two
directions. It is what torch's LSTM makes of packed sequences (tests/test_damsm.py compares them),
in tensor operations of one fixed shape, so that no length comes to the host: the backward direction
reads each caption turned round within its own length, so that what fills the rest of the row comes
after the words in both directions and reaches none of them.

Shapes: N captions, T words of the longest, E length of a word's vector, H of a direction's state,
D = 2 H features, 2 directions.
"""

import math

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Captions to features of each word and of the whole."""

    def __init__(self, words: int, vector: int, features: int, dropout: float) -> None:
        super().__init__()
        state = features // 2
        self.vectors = nn.Embedding(words, vector)
        self.input_2EG = nn.Parameter(torch.empty(2, vector, 4 * state))
        self.state_2HG = nn.Parameter(torch.empty(2, state, 4 * state))
        self.bias_21G = nn.Parameter(torch.empty(2, 1, 4 * state))
        self.dropout = dropout
        nn.init.uniform_(self.vectors.weight, -0.1, 0.1)
        for parameter in (self.input_2EG, self.state_2HG, self.bias_21G):
            nn.init.uniform_(parameter, -1 / math.sqrt(state), 1 / math.sqrt(state))

    def draws(self, length: int) -> int:
        """How many numbers a caption of so many places takes."""
        return length * self.vectors.embedding_dim

    def forward(
        self, tokens_NT: Tensor, lengths_N: Tensor, uniform_NM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of the words (N, T, D), 0 after the last, and of the captions (N, D), of int64
        tokens and lengths (at least 1). uniform_NM: in [0, 1), decides what is dropped of the
        words' vectors; nothing without."""
        vector_NTE = self.vectors(tokens_NT)
        if uniform_NM is not None:
            kept_NTE = (uniform_NM.view_as(vector_NTE) >= self.dropout).to(vector_NTE.dtype)
            vector_NTE = vector_NTE * kept_NTE / (1 - self.dropout)
        turned_NT, there_NT = turned(lengths_N, tokens_NT.shape[1])
        read_2NTE = torch.stack([vector_NTE, picked(vector_NTE, turned_NT)])
        state_2NTH = self._states(read_2NTE)
        words_NTD = torch.cat([state_2NTH[0], picked(state_2NTH[1], turned_NT)], 2)
        last_N1 = (lengths_N - 1)[:, None]
        ends = [picked(state_NTH, last_N1)[:, 0] for state_NTH in state_2NTH]
        return words_NTD * there_NT[:, :, None].to(words_NTD.dtype), torch.cat(ends, 1)

    def _states(self, read_2NTE: Tensor) -> Tensor:
        """The states (2, N, T, H) after each word, both directions at a time."""
        count, length = read_2NTE.shape[1:3]
        gate_2NTG = torch.baddbmm(self.bias_21G, read_2NTE.flatten(1, 2), self.input_2EG)
        gate_2NTG = gate_2NTG.unflatten(1, (count, length))
        state_2NH = cell_2NH = read_2NTE.new_zeros(2, count, self.state_2HG.shape[1])
        states = []
        for place in range(length):
            gates_2NG = gate_2NTG[:, :, place] + torch.bmm(state_2NH, self.state_2HG)
            begin, forget, value, end = gates_2NG.chunk(4, 2)
            cell_2NH = forget.sigmoid() * cell_2NH + begin.sigmoid() * value.tanh()
            state_2NH = end.sigmoid() * cell_2NH.tanh()
            states.append(state_2NH)
        return torch.stack(states, 2)


def there(lengths_N: Tensor, length: int) -> Tensor:
    """Where rows of so many places have words, bool (N, T)."""
    return torch.arange(length, device=lengths_N.device) < lengths_N[:, None]


def turned(lengths_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places (N, T) by which each caption is turned round and its filling left, and where there are
    words."""
    place_T = torch.arange(length, device=lengths_N.device)
    there_NT = there(lengths_N, length)
    return torch.where(there_NT, lengths_N[:, None] - 1 - place_T, place_T), there_NT


def picked(x_NTF: Tensor, place_NP: Tensor) -> Tensor:
    """Rows of each sequence at some places, (N, P, F)."""
    return x_NTF.gather(1, place_NP[:, :, None].expand(-1, -1, x_NTF.shape[2]))
