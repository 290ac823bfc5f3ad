"""Which of how many processes is this one, and where do they meet? What launchers say of it.

torchrun and accelerate set RANK, LOCAL_RANK and WORLD_SIZE; `srun python`, one task for each GPU,
sets Slurm's own variables. Without either this is the only process. Nothing heavy is imported here.
"""

import os
import subprocess

PORTS = range(20000, 30000)
"""Where the processes of a job step meet: below the ports that kernels hand out by themselves."""


def place() -> tuple[int, int, int]:
    """(rank, local rank, world size) of this process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in names)
        return rank, local_rank, world_size
    if in_step():
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
        return rank, local_rank, world_size
    return 0, 0, 1


def in_step() -> bool:
    """Whether srun started this process as one of several.

    A batch script and a shell on a node (`srun --pty bash`) have most of Slurm's variables too,
    and those of the allocation (SLURM_NTASKS) say nothing of how many processes there are.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    return "SLURM_STEP_ID" in os.environ and tasks > 1 and "SLURM_PTY_PORT" not in os.environ


def set_meeting_place() -> None:
    """Tell torch (its env:// way) where the tasks of an srun step meet; other launchers did.

    Raises ValueError where Slurm cannot be asked.
    """
    if "RANK" in os.environ or not in_step():
        return
    rank, local_rank, world_size = place()
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_address(os.environ["SLURM_STEP_NODELIST"])
    step = 7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(PORTS[step % len(PORTS)]))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}


def _first_address(nodes: str) -> str:
    """The address of the first of Slurm's nodes, whose name need not be a host's."""
    try:
        name = _ask("hostnames", nodes).split()[0]
        facts = dict(fact.split("=", 1) for fact in _ask("node", name).split() if "=" in fact)
        return facts["NodeAddr"]
    except (OSError, subprocess.CalledProcessError, LookupError) as error:
        raise ValueError(
            f"cannot ask Slurm for the address of the first of {nodes} ({error}); "
            f"set MASTER_ADDR to it"
        ) from None


def _ask(kind: str, name: str) -> str:
    command = ["scontrol", "show", kind, name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def doubts() -> list[str]:
    """What the launcher was told that will not do what is meant, one line each."""
    said, found = os.environ.get, []
    if int(said("TORCHELASTIC_MAX_RESTARTS", 0)) and said("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # of 8 restarts with gloo 4 failed, 0 of 8 with the variable (torch 2.15): keys of the
        # dead processes stay in the store that agent and workers share
        found.append(
            "torchrun's restarts fail about half of the time here; before torchrun, "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        found += _doubts_about_accelerate()
    return found


def _doubts_about_accelerate() -> list[str]:
    found = []
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        found.append(
            "accelerate was asked for several processes and started this one alone, as it does "
            "with --cpu; say --multi_gpu (without GPUs too), or use torchrun"
        )
    if _accelerate_uses("MEGATRON_LM"):
        found.append("accelerate's Megatron settings are not read")
    if accelerate_way():
        found.append(
            "of accelerate's FSDP and DeepSpeed settings the kind and the ZeRO stage are taken, "
            "where --parallel is auto; the others are not read"
        )
    return found


def accelerate_way() -> str | None:
    """The way of sharing (a value of --parallel) that accelerate's configuration asks for."""
    if _accelerate_uses("FSDP"):
        return "fsdp2"
    if _accelerate_uses("DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return f"deepspeed-zero{stage}" if stage in ("1", "2", "3") else "ddp"
    return None


def _accelerate_uses(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def accelerate_precision() -> str | None:
    """The mixed precision (bf16, fp16, fp8) that accelerate's configuration asks for; None for
    `no`, which accelerate says too where nobody chose."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if said == "no" else said


def accelerate_wants_cpu() -> bool:
    """Whether accelerate's configuration keeps this run off the GPUs."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
