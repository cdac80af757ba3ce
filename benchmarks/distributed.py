"""What a committed step of a GPT costs in plain steps, in time and memory, on one rank or several.

    python benchmarks/distributed.py --size 10m
    torchrun --nproc-per-node 2 benchmarks/distributed.py -- --size 10m
    python benchmarks/distributed.py --size 124m --device cuda --autocast

A window of K steps is trained plainly; rolled, looked back at and replayed, which is what a
committed step takes where the stride is the window and the rewrite is taken; and replayed alone.
AdamW on random tokens; a terminal loss at the average of the iterates, on one batch. Memory is the
peak above what the process held before the model was made: of the GPU, or resident. --budget is
what looking back may take beyond plain training, as a share of plain training's peak; states that
do not fit are on disk. Ranks share the batch. Prints a line per round, and rows as JSON with -o.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import gpt, text_loss
from torch import Tensor, nn

from rhc.distributed import Ranks, joined, leave, shard
from rhc.hypergradient import ReversePass
from rhc.schedule import Schedule
from rhc.training import memory
from rhc.training.batches import batch_size
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.snapshot import Snapshot

SIZES: dict[str, dict[str, int]] = {
    "1m": {"layers": 3, "width": 128, "context": 64, "heads": 4, "vocabulary": 65},
    "10m": {"layers": 6, "width": 384, "context": 128, "heads": 6, "vocabulary": 65},
    # GPT-2 small: its 124 M parameters, and 39 M of a head that is not tied to the embedding.
    "124m": {"layers": 12, "width": 768, "context": 1024, "heads": 12, "vocabulary": 50304},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="10m", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8, help="of all ranks together")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--product", default="forward-difference")
    parser.add_argument("--budget", type=float, default=0.6, help="0 for no limit")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--spill", type=Path, help="folder of states that do not fit")
    parser.add_argument("-o", "--output", type=Path, help="rows are added to it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with joined(arguments.device) as ranks:
        for number in range(arguments.rounds):
            row = measured(arguments, ranks)
            if ranks is None or ranks.first:
                print(json.dumps(row, indent=1), flush=True)
                if arguments.output is not None:
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(row | {"round": number}) + "\n")
    if ranks is not None:
        leave(0)


def measured(arguments: argparse.Namespace, ranks: Ranks | None) -> dict[str, Any]:
    """One round: seconds per step and peaks of plain training, of looking back, of a replay."""
    device = torch.device(arguments.device)
    held = _peak(device, lambda: None)
    size = SIZES[arguments.size]
    torch.manual_seed(0)
    model = gpt(**size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    plant = Plant(model, optimizer, _loss(arguments), ranks=ranks)
    draw = torch.Generator().manual_seed(1)

    def batch() -> Any:
        shape = (arguments.batch, size["context"] + 1)
        tokens = torch.randint(size["vocabulary"], shape, generator=draw).to(device)
        whole = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        if ranks is None:
            return whole
        return shard(whole, batch_size(whole), ranks.rank, ranks.size)

    steps = arguments.window
    batches, held_out = [batch() for _ in range(steps)], batch()
    schedule = Schedule.constant(steps, lr=1e-4)
    plant.step(batches[0], {}, 0)  # warm, and the optimizer's slots are there
    before: Snapshot | None = None  # plain training has none

    def plain() -> None:
        for i, b in enumerate(batches):
            plant.step(b, schedule.at(i), i)

    waited: dict[str, float] = {}
    seconds: dict[str, float] = {}
    computed: dict[str, float] = {}  # on machines that others use too
    peaks: dict[str, int] = {}

    def run(name: str, function: Callable[[], Any]) -> Any:
        if before is not None:
            plant.restore(before)
        gc.collect()
        sent = 0.0 if ranks is None else ranks.waited
        found: list[Any] = []

        def timed() -> None:
            began, cpu = time.perf_counter(), time.process_time()
            found.append(function())
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = (time.perf_counter() - began) / steps
            computed[name] = (time.process_time() - cpu) / steps

        peaks[name] = _peak(device, timed) - held
        if ranks is not None:
            waited[name] = (ranks.waited - sent) / steps
        return found[0]

    run("plain", plain)
    before = plant.snapshot()
    run("replay", lambda: plant.roll(batches, schedule))
    objective = Objective(average=0.99)
    budget = int(arguments.budget * peaks["plain"]) or None
    reverse_pass = ReversePass(
        plant,
        objective,
        ("lr",),
        product=arguments.product,
        memory_budget=budget,
        spill=True if arguments.spill is None else arguments.spill,
    )
    plan = reverse_pass.plan(steps, batches[0])

    def look() -> Any:
        mean = Average(objective.average)
        recorder = reverse_pass.roll(batches, schedule, average=mean)
        try:
            return reverse_pass.differentiate(recorder, mean, lambda model: plant.loss(held_out)[0])
        finally:
            recorder.close()

    h = run("look", look)
    once = 0 if ranks is None else ranks.sent
    run("plain again", plain)
    elements = 0 if ranks is None else (ranks.sent - once) // steps
    base = (seconds["plain"] + seconds["plain again"]) / 2
    base_cpu = (computed["plain"] + computed["plain again"]) / 2
    return {
        "size": arguments.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ranks": 1 if ranks is None else ranks.size,
        "batch": arguments.batch,
        "window": steps,
        "product": h.product,
        "plan": plan.lines(),
        "plain_seconds": base,
        "look_back_plain_steps": seconds["look"] / base,
        "replay_plain_steps": seconds["replay"] / base,
        "committed_plain_steps": (seconds["look"] + seconds["replay"]) / base,
        "look_back_plain_steps_cpu": computed["look"] / base_cpu,
        "committed_plain_steps_cpu": (computed["look"] + computed["replay"]) / base_cpu,
        "gradients_per_step": 2 + h.gradient_equivalents / steps,
        "plain_peak_bytes": peaks["plain"],
        "peak_ratio": peaks["look"] / peaks["plain"],
        "elements_per_plain_step": elements,
        "waited_share": waited.get("look", 0.0) / seconds["look"],
        "waited_share_of_plain": waited.get("plain", 0.0) / seconds["plain"],
        "outcome": h.result.name,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _loss(arguments: argparse.Namespace) -> Callable[[nn.Module, Any], Tensor]:
    @contextlib.contextmanager
    def reduced() -> Iterator[None]:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.autocast):
            yield

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with reduced():
            return text_loss(model, batch)

    return loss_fn


def _peak(device: torch.device, function: Callable[[], None]) -> int:
    """The most that the process holds while `function` runs."""
    memory.trim()
    memory.reset_peak(device)
    function()
    return memory.current_peak(device)


if __name__ == "__main__":
    main()
