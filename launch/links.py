"""What a reduction over ranks costs on given links: figures with their sources.

The form is NCCL's own (src/graph/tuning.cc at b6475625): seconds = base + steps * latency + bytes
moved / (bandwidth * share), the cheapest of the ways that it may take. Sources:

- NVLink: NVIDIA H100 datasheet, 900 GB/s both ways together, so 450 each way; NCCL counts on 20.6
  GB/s of each of the 18 links (src/graph/topo.h, SM90_NVLINK_BW).
- InfiniBand: ConnectX-7 user manual, one NDR port of 400 Gb/s = 50 GB/s; NCCL plans with 48
  (src/graph/search.cc, sm90SpeedArrayInter). Eight GPUs and eight such ports per node: DGX H100
  datasheet.
- Latencies: baseLat and hwLat of tuning.cc. Shares: there, too (LL a quarter, LL128 120/128, trees
  0.92 and 0.85, NVLS 5/6), without its corrections for other machines.
- Ring: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms". Tree: Sanders, Speck and
  Traff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan".

Assumed: nothing else is on the links, and a reduction over several nodes does its stages one after
the other: inside each node, then each GPU its part of the result between nodes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = Callable[[int], tuple[float, float]]  # ranks -> (steps, bytes moved per byte reduced)


def ring(n: int) -> tuple[float, float]:
    """Reduce-scatter and all-gather round a ring."""
    return 2 * (n - 1), 2 * (n - 1) / n


def chain(n: int) -> tuple[float, float]:
    """To one end and back: what NCCL's tree is inside a node."""
    return 2 * (n - 1), 2.0


def tree(n: int) -> tuple[float, float]:
    """Up and down two binary trees, half of the bytes each."""
    return 2 * math.log2(n), 2.0


def switch(n: int) -> tuple[float, float]:
    """The switch adds and sends to all (NVLink SHARP)."""
    return 1, 1.0


@dataclass(frozen=True)
class Stage:
    """One stage of a reduction: its shape, seconds per step, share of the link's bandwidth."""

    shape: Shape
    latency: float
    share: float

    def seconds(self, size: float, ranks: int, bandwidth: float) -> float:
        """Time for `size` bytes of each of so many ranks."""
        if ranks == 1:
            return 0.0
        steps, moved = self.shape(ranks)
        return steps * self.latency + size * moved / (bandwidth * self.share)


@dataclass(frozen=True)
class Way:
    """An algorithm and protocol: seconds to start, and its stages inside and between nodes."""

    name: str
    base: float
    near: Stage
    far: Stage


NCCL = (
    Way("ring LL", 6.6e-6, Stage(ring, 0.6e-6, 0.25), Stage(ring, 2.7e-6, 0.25)),
    Way("ring LL128", 14e-6, Stage(ring, 1.9e-6, 0.92), Stage(ring, 4e-6, 0.92)),
    Way("ring Simple", 8.4e-6, Stage(ring, 3.4e-6, 1.0), Stage(ring, 14e-6, 1.0)),
    Way("tree LL", 6.8e-6, Stage(chain, 0.6e-6, 0.2), Stage(tree, 5e-6, 0.2)),
    Way("tree LL128", 14e-6, Stage(chain, 1.25e-6, 0.73), Stage(tree, 8.5e-6, 0.73)),
    Way("tree Simple", 0.0, Stage(chain, 28e-6, 0.78), Stage(tree, 28e-6, 0.78)),
    Way("NVLS", 0.0, Stage(switch, 23e-6, 5 / 6), Stage(tree, 14e-6, 5 / 6)),
)


@dataclass(frozen=True)
class Cluster:
    """Links between ranks: bytes per second each way per rank, inside a node and between nodes.

    aside: reductions run beside computation; not so where the same cores do both.
    """

    name: str
    near: float
    far: float
    per_node: int
    ways: tuple[Way, ...]
    aside: bool = True


H100 = Cluster("H100 SXM, NVLink 4, one InfiniBand NDR port each", 18 * 20.6e9, 48e9, 8, NCCL)


def local(bandwidth: float, latency: float, ranks: int) -> Cluster:
    """Processes on the cores of one machine, whose all-reduce between two of them was measured to
    take latency + bytes / bandwidth seconds."""
    stage = Stage(ring, latency / 2, 1.0)
    way = Way("measured", 0.0, stage, stage)
    return Cluster("this machine", bandwidth, bandwidth, ranks, (way,), aside=False)


def all_reduce(cluster: Cluster, size: int, ranks: int) -> float:
    """Seconds until `size` bytes of every rank are summed on every rank."""
    near = min(ranks, cluster.per_node)
    far = math.ceil(ranks / near)
    return min(
        way.base
        + way.near.seconds(size, near, cluster.near)
        + way.far.seconds(size / near, far, cluster.far)
        for way in cluster.ways
    )


def all_gather(cluster: Cluster, size: int, ranks: int) -> float:
    """Seconds until every rank has the `size` bytes of every rank: bounded by the reduction of a
    buffer that has a place for each, which is what it costs with few bytes."""
    return all_reduce(cluster, size * ranks, ranks)
