"""How a codebook follows the vectors that its codes stand for, without a gradient.

van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, appendix A.1, equations 6 to 8: of the
n_k vectors z of a batch whose nearest code is k,

    N_k <- decay N_k + (1 - decay) n_k
    m_k <- decay m_k + (1 - decay) sum z
    e_k <- m_k / N_k

with Laplace smoothing of N_k as in the authors' code (Sonnet's VectorQuantizerEMA): (N_k + eps) /
(n + K eps) n, where n is the sum of all N_k. A batch is that of all ranks.

A code whose N_k has fallen below a threshold is dead, and begins anew at a vector of the batch
drawn at random (Dhariwal et al. 2020, "Jukebox", https://arxiv.org/abs/2005.00341, section 3.1);
N_k is then the threshold, and m_k fits it. The vector is made longer or shorter by at most a
twentieth: flat areas of images have equal vectors, and of codes that begin at equal ones rounding
would choose.

Shapes: K codes, D length of a code's vector, M vectors of this rank's part of the batch.
"""

import torch
from torch import Tensor

from engine.algorithm import Values
from engine.networks.vqvae import Codebook
from engine.player import Player
from kernels import philox

REVIVAL = 11  # noise stream
JITTER = 0.05
EPS = 1e-5


@torch.no_grad()
def follow(
    player: Player,
    z_NDhw: Tensor,
    code_Nhw: Tensor,
    key: Tensor,
    position_N: Tensor,
    *,
    decay: float,
    revive_below: float,
) -> Values:
    """Let the codebook of a player's network take in a batch: this rank's vectors, float32, their
    codes, int64, and the images' places in the stream. What is found is the same on all ranks."""
    book, ranks = player.network.codebook, player.shared.ranks
    begin_1 = position_N[:1] - ranks.rank * len(position_N)  # of the batch of all ranks
    measure = player.compiler(codebook_statistics)
    told_KF = measure(book, z_NDhw, code_Nhw, key, position_N, begin_1, ranks.world_size)
    if not player.rehearsing:
        ranks.sum(told_KF)
    return absorb(book, told_KF, decay, revive_below)


def codebook_statistics(
    book: Codebook,
    z_NDhw: Tensor,
    code_Nhw: Tensor,
    key: Tensor,
    position_N: Tensor,
    begin_1: Tensor,
    world_size: int,
) -> Tensor:
    """Of each code what, summed over ranks, `absorb` needs, float32 (K, 1 + 2 D): how many vectors
    it stands for; their sum; the vector drawn for it, which but for one rank is 0.

    The draw is one for the batch, a function of where that begins in the stream (begin_1, int64
    (1,)), so that it does not depend on how many ranks there are.
    """
    z_MD, code_M = z_NDhw.movedim(1, -1).flatten(0, 2), code_Nhw.flatten()
    codes, rows = len(book.sizes_K), len(z_MD)
    # a product in place of index_add, whose order of summation is chance on a GPU
    chosen_MK = (code_M[:, None] == torch.arange(codes, device=code_M.device)).to(z_MD.dtype)
    word_2K = philox.bits(key, REVIVAL, begin_1, 2 * codes)[0].view(2, codes)
    row_K, length_K = word_2K[0] % (rows * world_size), 1 + JITTER * (word_2K[1] * 2.0**-31 - 1)
    own_K = row_K - (position_N[0] - begin_1) * code_Nhw[0].numel()
    here_K1 = ((own_K >= 0) & (own_K < rows))[:, None]
    drawn_KD = z_MD[own_K.clamp(0, rows - 1)] * length_K.to(z_MD.dtype)[:, None]
    drawn_KD = torch.where(here_K1, drawn_KD, 0.0)
    return torch.cat([chosen_MK.sum(0)[:, None], chosen_MK.T @ z_MD, drawn_KD], 1)


def absorb(book: Codebook, told_KF: Tensor, decay: float, revive_below: float) -> Values:
    """Equations 6 to 8 and the revival, in place, from the statistics of all ranks. The batch's
    perplexity exp(-sum p log p), the share of codes in use, and how many were revived."""
    length = book.vectors_KD.shape[1]
    count_K1, sum_KD, drawn_KD = told_KF.split([1, length, length], 1)
    count_K = count_K1[:, 0]
    book.sizes_K.lerp_(count_K, 1 - decay)
    book.sums_KD.lerp_(sum_KD, 1 - decay)
    dead_K = book.sizes_K < revive_below
    book.sizes_K.masked_fill_(dead_K, revive_below)
    dead_K1 = dead_K[:, None]
    book.sums_KD.copy_(torch.where(dead_K1, drawn_KD * revive_below, book.sums_KD))
    whole = book.sizes_K.sum()
    smooth_K = (book.sizes_K + EPS) / (whole + len(count_K) * EPS) * whole
    book.vectors_KD.copy_(torch.where(dead_K1, drawn_KD, book.sums_KD / smooth_K[:, None]))
    return {
        "codebook/perplexity": perplexity(count_K),
        "codebook/in_use": (count_K > 0).float().mean(),
        "codebook/revived": dead_K.float().sum(),
    }


def perplexity(count_K: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies, (): K where all are used alike, 1 for one."""
    return torch.special.entr(count_K / count_K.sum()).sum().exp()
