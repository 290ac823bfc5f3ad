"""One iteration of training, run as it is written or, on a GPU, replayed as a captured CUDA graph.

A graph holds all that an iteration does on the device: the gather from the resident images, every
update with its optimizer, averages, statistics and the clock's advance. There is one for each set
of updates (`Algorithm.turns`). The host's part (data made ready, counts of images and statistics)
runs beside it.

Nothing has to be undone. The first iterations of each set run as they are written, and are the
warm-up: kernels are chosen, state is made. Recording a graph runs nothing on the device, so the
iteration that is recorded is done by the graph's first replay. Graphs share one memory pool and
nobody reads what they leave there, so they may be replayed in any order.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch

from engine import watchdog
from engine.session import Session
from engine.settings import Recipe
from engine.stats import Stats
from pipelines.open import Pipeline

WARM_UP = 3  # iterations of a set of updates before it is recorded
SETTLED = 12  # all in all: DDP times its first ten, which no graph can hold

Result = TypeVar("Result")


class Graph(Protocol):
    """Work on the device that was recorded."""

    def record(self, work: Callable[[], Result]) -> Result:
        """Take down what `work` gives to the device, which does not do it. Raises RuntimeError."""

    def replay(self) -> None:
        """Have the device do it."""


class CudaGraph:
    """A CUDA graph, recorded on the current stream, which must not be the default one."""

    _pool: tuple[int, int] | None = None

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Result]) -> Result:
        CudaGraph._pool = CudaGraph._pool or torch.cuda.graph_pool_handle()
        # NCCL's and the data's own threads may go on meanwhile: this thread alone is held to it
        with torch.cuda.graph(
            self._graph,
            pool=CudaGraph._pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            return work()

    def replay(self) -> None:
        self._graph.replay()


def choose_graph(recipe: Recipe, device: torch.device, profile: bool = False) -> tuple[bool, str]:
    """Whether iterations are captured, and why (not)."""
    if recipe.graph == "off":
        return False, "--graph on captures iterations; not yet measured on a GPU"
    if device.type != "cuda":
        return False, "a CUDA graph needs a GPU"
    if recipe.parallel not in ("auto", "ddp"):
        return False, f"--parallel {recipe.parallel} is not captured"
    if profile:
        return False, "--profile looks at single operations"
    return True, "as asked"


def own_stream(device: torch.device) -> None:
    """Have this thread work on a stream of its own from now on. Before networks are built: their
    gradients are summed where they were first seen, and the default stream cannot be recorded."""
    torch.cuda.set_stream(torch.cuda.Stream(device))


class Iteration:
    """The iterations of a session, one a call. `pipeline.ready` comes before it.

    graph: what records them; None runs each as it is written. say: told once what becomes of it.
    """

    def __init__(
        self,
        session: Session,
        pipeline: Pipeline,
        stats: Stats,
        graph: Callable[[], Graph] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.session, self.pipeline, self.stats = session, pipeline, stats
        self._graph, self._say = graph, say
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Graph, list[str]]] = {}

    def __call__(self) -> None:
        """Go on by one iteration."""
        clock = self.session.clock
        turns = self.session.recipe.step.turns(clock.iteration)
        if turns not in self._recorded and self._is_warm(turns):
            self._record(turns)
        if turns in self._recorded:
            clock.enter(watchdog.STEP)
            graph, names = self._recorded[turns]
            graph.replay()
        else:
            names = self._on_device()
            self._seen[turns] += 1
        clock.advance_host()
        self.stats.count(names)

    def forget(self) -> None:
        """Drop what was recorded: a state that is restored is not where it was."""
        self._recorded.clear()
        self._seen.clear()

    def _on_device(self) -> list[str]:
        """What the device does; the names of the statistics."""
        clock = self.session.clock
        batch = self.pipeline.batch(clock)
        clock.enter(watchdog.STEP)
        names = self.stats.sum(self.session.step(batch))
        clock.advance_device()
        return names

    def _is_warm(self, turns: Hashable) -> bool:
        return (
            self._graph is not None
            and self._seen[turns] >= WARM_UP
            and self._seen.total() >= SETTLED
        )

    def _record(self, turns: Hashable) -> None:
        graph = self._graph()
        try:
            names = graph.record(self._on_device)
        except RuntimeError as error:
            self._graph = None
            for player in self.session.players.values():
                player.shared.forget()  # gradients that were recorded hold nothing
            first = str(error).strip().split("\n", 1)[0][:300]
            self._say(f"graph: off from here on (the iteration cannot be captured: {first})")
            return
        if not self._recorded:
            images = f"{self.session.clock.images:,} images"
            self._say(f"graph: iterations are replayed as CUDA graphs from {images} on")
        self._recorded[turns] = graph, names
