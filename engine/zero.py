"""DeepSpeed's ZeRO: optimizer state, gradients, parameters spread over ranks; an engine a player.

Each stage has its ready settings in launch/zeroN.json. float32 engines under our autocast; clipping
is ours (DeepSpeed's own default would clip silently). Rajbhandari et al. 2020, "ZeRO: memory
optimizations toward training trillion parameter models", section 5.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.optimizer import Guarded
from engine.parallel import Alone, Piece, Root, State
from engine.world import Ranks

SETTINGS = Path(__file__).parents[1] / "launch"
MISSING = "DeepSpeed is not installed; pip install 'saddle[deepspeed]', or use --parallel fsdp2"


def missing() -> str:
    """What is lacking for DeepSpeed here; empty if nothing."""
    return "" if find_spec("deepspeed") else MISSING


class Zero(Alone):
    """ZeRO-1: the optimizer state is spread (ZeRO-2: gradients too), parameters are everywhere."""

    spread = True
    memory_format = torch.contiguous_format  # DeepSpeed trains slices of flat copies

    stage = 1

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        super().__init__(network, ranks)
        self._named = {n: p for n, p in network.named_parameters() if p.requires_grad}

    def engage(self, optimizer: Guarded, accumulate: int) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")  # its warnings are of settings that are ours
        settings: dict[str, Any] = json.loads((SETTINGS / f"zero{self.stage}.json").read_text())
        settings |= {"train_micro_batch_size_per_gpu": 1}  # for its own throughput figures alone
        settings |= {"gradient_accumulation_steps": accumulate}
        deepspeed.init_distributed(dist_init_required=False)
        self._engine, *_ = deepspeed.initialize(
            model=self.root, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.optimizer, self.root = optimizer, self._engine

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self._engine.step()  # counts micro-batches, and steps after the last one

    @contextmanager
    def rehearsal(self) -> Iterator[nn.Module]:
        yield Root(self.network)

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        self._engine.step()
        if getattr(self._engine.optimizer, "overflow", False):  # skipped before our guard saw it
            self.optimizer.norm = torch.full((), torch.inf, device=self.ranks.device)

    def forget(self) -> None:
        self._engine.zero_grad()

    # -- state -------------------------------------------------------------------------------------

    def moments(self) -> State:
        """Of the flat part that this rank steps, cut at the parameters' borders."""
        state = self.optimizer.state.get(self._flat(), {})
        found: State = {}
        for name, (piece, start) in self._parts().items():
            for key, value in state.items():
                part = value if key == "step" else value[start : start + len(piece.values)]
                found[f"{name}/{key}"] = part if key == "step" else piece._replace(values=part)
        return found

    @torch.no_grad()
    def clamp(self, bound: float) -> None:
        super().clamp(bound)
        for values in self.parameters().values():  # of which those are copies
            whole = values.values if isinstance(values, Piece) else values
            whole.clamp_(-bound, bound)

    @torch.no_grad()
    def loaded(self) -> None:
        """Bring the values of the network to the copies that are stepped."""
        for name, (piece, _) in self._parts().items():
            whole = self._named[name].detach().view(-1)
            piece.values.copy_(whole[piece.begin : piece.begin + len(piece.values)])

    def _flat(self) -> Tensor:
        """This rank's part of all parameters, padded, as the optimizer steps it."""
        (flat,) = self._stepped()
        return flat

    def _parts(self) -> dict[str, tuple[Piece, int]]:
        """By parameter, this rank's part of it and where that begins in the flat tensor."""
        parts = {}
        for name, p in self._named.items():
            mapping = p._hp_mapping
            if mapping is None:  # other ranks step all of it
                empty = self._flat().detach()[:0]
                parts[name] = (Piece(empty, p.numel(), p.shape), 0)
                continue
            there, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            values = self._flat().detach()[here.start : here.start + here.numel]
            parts[name] = (Piece(values, there.start, p.shape), here.start)
        return parts


class Zero2(Zero):
    """The same with another stage's settings."""

    stage = 2


class Zero3(Zero):
    """ZeRO-3: the parameters are spread too, and gathered module by module while they are used."""

    stage = 3
    sharded = True

    def __init__(self, network: nn.Module, ranks: Ranks) -> None:
        super().__init__(network, ranks)
        self.shell = copy.deepcopy(network).to("meta")
        self._shapes = {name: p.shape for name, p in network.named_parameters()}

    def parameters(self) -> State:
        named = self.network.named_parameters()
        return {name: self._piece(name, p.ds_tensor) for name, p in named}

    def _piece(self, name: str, padded: Tensor) -> Piece:
        """Each rank has as many values, padded at the end of the last ones."""
        count, each = self._shapes[name].numel(), padded.numel()
        begin = min(self.ranks.rank * each, count)
        values = padded.detach().view(-1)[: min(each, count - begin)]
        return Piece(values, begin, self._shapes[name])

    def _stepped(self) -> list[Tensor]:
        return self._engine.optimizer.fp32_partitioned_groups_flat

    @torch.no_grad()
    def clamp(self, bound: float) -> None:
        super().clamp(bound)
        self._gather_again()

    @torch.no_grad()
    def loaded(self) -> None:
        for name, (piece, _) in self._parts().items():
            piece.values.copy_(self._piece(name, self._named[name].ds_tensor).values)
        self._gather_again()

    def _gather_again(self) -> None:
        """DeepSpeed keeps small parameters whole from one step to the next: let go of those copies,
        and gather them of the parts as they are now. Every rank calls it."""
        self._engine.optimizer.checkpoint_event_prologue()
        self._engine.optimizer.checkpoint_event_epilogue()

    def _parts(self) -> dict[str, tuple[Piece, int]]:
        from deepspeed.utils import safe_get_local_fp32_param

        flat, parts = self._flat().detach(), {}
        for name, p in self._named.items():
            local = safe_get_local_fp32_param(p).detach()
            start = (local.data_ptr() - flat.data_ptr()) // flat.element_size()
            piece = self._piece(name, p.ds_tensor)
            parts[name] = (piece._replace(values=local.view(-1)[: len(piece.values)]), start)
        return parts


STAGES = {"deepspeed-zero1": Zero, "deepspeed-zero2": Zero2, "deepspeed-zero3": Zero3}
