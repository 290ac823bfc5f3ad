"""The page that `--profile` writes: shares, the operations that take most, and plain advice."""

import os

import torch

from engine.precision import has_bf16
from engine.profiling import peaks
from engine.profiling.shares import Found, Row, Shares
from engine.run import device_name
from engine.session import Session
from engine.sharing import compile_obstacle

MOST = 15  # rows
MEANINGS = {
    "compute": "the device computes",
    "communication": "ranks exchange gradients and statistics, and nothing is computed meanwhile",
    "gaps": "launch gaps: in the step, but the host has not yet launched what comes next",
    "data": "the pipeline makes a batch",
    "host": "between steps: statistics, curves, the terminal",
}
Rates = dict[torch.dtype, float]


def write(found: Found, session: Session, pipeline: str, name: str) -> str:
    """The page, in Markdown."""
    device, ranks = session.clock.device, session.ranks.world_size
    player = next(iter(session.players.values()))
    copied, rates = peaks.bytes_per_s(device), _rates(found, device)
    speed = session.clock.batch / found.seconds
    lines = [
        f"# Profile of {name}",
        "",
        f"{found.iterations} iterations of {session.clock.batch} images, "
        f"{1000 * found.seconds:,.2f} ms each ({speed:,.0f} images/s with the profiler's own cost);"
        f" {device_name(device).strip()}, {ranks} rank(s), {player.precision.name}, compile "
        f"{'on' if player.compiler.active else 'off'}, pipeline {pipeline}."
        + _incomplete(found, session.recipe.step.period()),
        "",
        "## Where the time goes",
        "",
        "| share | ms | |",
        "|---|---|---|",
    ]
    for part, share in vars(found.shares).items():
        took = 1000 * share * found.seconds
        lines.append(f"| {share:.1%} | {took:,.2f} | {MEANINGS[part]} |")
    lines += ["", "## What takes most of it", "", *_table(found, rates, copied), ""]
    lines += [_floor(found, rates, copied), "", "## Advice", ""]
    lines += [f"- {text}" for text in advice(found, session, pipeline, rates, copied)]
    return "\n".join(lines) + "\n"


def _incomplete(found: Found, period: int) -> str:
    if found.iterations % period == 0:
        return ""
    return f" The run ended within the {period} iterations after which its updates repeat."


def in_a_line(shares: Shares) -> str:
    """The shares, in words."""
    return ", ".join(f"{part} {share:.0%}" for part, share in vars(shares).items())


def _rates(found: Found, device: torch.device) -> Rates:
    """FLOP/s by each dtype in which something is multiplied."""
    kinds = {row.cost.dtype for row in found.rows if row.cost and row.cost.flops}
    return {kind: peaks.flops_per_s(device, kind) for kind in sorted(kinds, key=str)}


def floor(row: Row, rates: Rates, copied: float) -> float:
    """Seconds per iteration that an operation of known cost must take at these rates."""
    multiplied = row.cost.flops / rates[row.cost.dtype] if row.cost.flops else 0.0
    return row.calls * max(multiplied, row.cost.bytes / copied)


def _table(found: Found, rates: Rates, copied: float) -> list[str]:
    lines = [
        "| share | ms | calls | operation | GFLOP | MB | of its roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found.rows[:MOST]:
        shapes = ", ".join("x".join(map(str, shape)) for shape in row.shapes[:3])
        if len(row.shapes) > 3:
            shapes += f" and {len(row.shapes) - 3} more"
        cells = [f"{row.seconds / found.seconds:.1%}", f"{1000 * row.seconds:,.2f}"]
        cells += [f"{row.calls:,.3g}", f"{row.name} {shapes}".strip()]
        if row.cost:
            reached = floor(row, rates, copied) / row.seconds
            cells += [f"{row.calls * row.cost.flops / 1e9:,.2f}"]
            cells += [f"{row.calls * row.cost.bytes / 1e6:,.1f}", f"{reached:.0%}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _floor(found: Found, rates: Rates, copied: float) -> str:
    known = [row for row in found.rows if row.cost]
    flops = sum(row.calls * row.cost.flops for row in known)
    least = sum(floor(row, rates, copied) for row in known)
    said = ", ".join(f"{r / 1e12:.3g} TFLOP/s in {str(k)[6:]}" for k, r in rates.items())
    return (
        f"The roofline was measured here: {said}, {copied / 1e9:,.3g} GB/s copied. An iteration "
        f"counts {flops / 1e9:,.3g} GFLOP; at that roofline its operations of known cost would "
        f"take {1000 * least:,.2f} ms, {least / found.seconds:.0%} of the time. Above 100 %: the "
        f"data was in a cache. Compiled functions' fused loops are not counted."
    )


def advice(found: Found, session: Session, pipeline: str, rates: Rates, copied: float) -> list[str]:
    """What to change, the largest share first; at least one line."""
    shares, player = found.shares, next(iter(session.players.values()))
    device, ranks = session.clock.device, session.ranks.world_size
    told = []
    if shares.data > 0.1:
        other = (
            "a smaller --data.resolution" if pipeline == "resident" else "--data.pipeline resident"
        )
        told.append((shares.data, f"data takes {shares.data:.0%}: {other} makes batches faster"))
    if shares.gaps > 0.2:
        remedies = ["a larger --data.batch"]
        if not player.compiler.active and not compile_obstacle(session.recipe, ranks):
            remedies.insert(0, "--compile required")
        if device.type == "cuda" and session.recipe.graph == "off":
            remedies.insert(0, "--graph on")
        told.append((shares.gaps, f"launch gaps take {shares.gaps:.0%}: {', or '.join(remedies)}"))
    if shares.communication > 0.1:
        text = f"communication takes {shares.communication:.0%}: a larger --data.batch exchanges"
        told.append((shares.communication, f"{text} less often"))
    if shares.host > 0.1:
        told.append((shares.host, f"the host takes {shares.host:.0%}: a larger --log-every"))
    if player.precision.name == "fp32" and has_bf16(device)[0]:
        told.append((shares.compute, "it computes in fp32, and bf16 is here: --precision bf16"))
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if device.type == "cpu" and threads * ranks < cores:
        text = f"{threads * ranks} of {cores} cores compute: OMP_NUM_THREADS={cores // ranks}"
        told.append((shares.compute, text))
    if not told:
        told.append((0.0, f"nothing to change stands out: {shares.compute:.0%} is computing"))
    return [text for _, text in sorted(told, reverse=True)] + _slow(found, rates, copied)


def _slow(found: Found, rates: Rates, copied: float) -> list[str]:
    """The operations that take long for what they do."""
    lines = []
    for row in found.rows[:MOST]:
        share = row.seconds / found.seconds
        if row.cost and share > 0.1 and floor(row, rates, copied) < 0.3 * row.seconds:
            reached = floor(row, rates, copied) / row.seconds
            lines.append(
                f"{row.name} of {'x'.join(map(str, row.shapes[0]))} takes {share:.0%} at "
                f"{reached:.0%} of its roofline: a larger --data.batch gives it more to do at once"
            )
    return lines
