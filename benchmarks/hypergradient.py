"""Time, memory and accuracy of looking back, against plain training on the same machine.

    python benchmarks/hypergradient.py --model gpt --optimizer sgd --steps 10 50 200 -o gpt.json

All modes differentiate the same J = Σ_t ℓ_t + ℓ(held-out batch at the end of the window), from the
same weights, batches and fresh optimizer state, with respect to the controls of its K steps. Modes:

    plain                 training, nothing else; its row shows how well the figures repeat
    higher, torchopt      the libraries' own unrolled graphs, without rhc
    SEGMENT/PRODUCT       rhc; SEGMENT is a number, root (√K) or all (K)
    auto                  rhc with its defaults
    budget:1/3            rhc, exact, with memory_budget = 1/3 of higher's memory above plain
                          (torchopt's where higher refuses); it may use the disk, while
                          budget:1/3:memory may not

One process per measurement, and the modes take turns (--rounds). A process warms up on two steps,
and then alternates (--alternations) plain training of K steps with the mode on K steps: its figure
is the median of the mode's times over the median of the plain ones, window after window as a run
has them. The table has the median of the processes, and their range.

Memory is the peak of the mode minus the peak of plain training, in the same process: resident
memory on a CPU, whose high-water mark is set back before each part, allocated memory on CUDA. It
is of repetitions of its own, before which all free memory goes back to the system. What those take
in time is told too (fresh): every page is then touched for the first time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PRODUCTS = ("exact", "forward-difference", "central-difference")
MODES = (
    "plain",
    "higher",
    "torchopt",
    *(f"1/{product}" for product in PRODUCTS),
    "root/exact",
    "all/exact",
    "auto",
    *(f"budget:1/{share}" for share in (1, 3, 12, 40)),
)
QUICK = ("higher", "torchopt", "1/exact", "1/forward-difference", "budget:1/3")
MODE = (
    r"plain|higher|torchopt|auto|(\d+|root|all)/("
    + "|".join(PRODUCTS)
    + r")|budget:\d+/[1-9]\d*(:memory)?"
)
UNROLLED = ("higher", "torchopt", "all/exact")
REFERENCES = ("all/exact", "higher", "root/exact", "1/exact")
"""The first of these that was measured is what dJ/dlr is compared with."""

LR = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
MOMENTUM = 0.9
BETA2 = 0.999


# The parent: which processes to run, and what they add up to --------------------------------------


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    print(headline(arguments))
    found = []
    memory_of: dict[str, tuple[int, float]] = {}  # unrolled mode -> (K, bytes above plain)
    for steps in sorted(arguments.steps):
        processes = run_rounds(steps, arguments, memory_of)
        rows = summarize(processes)
        print(f"\n{table(steps, rows, arguments)}", flush=True)
        found.append({"steps": steps, "rows": rows, "processes": processes})
        if arguments.output:
            record = {"headline": headline(arguments), "arguments": vars(arguments), "found": found}
            arguments.output.write_text(json.dumps(record, indent=1, default=str) + "\n")


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt", choices=("gpt", "mlp", "cnn", "lstm"))
    parser.add_argument("--optimizer", default="sgd", choices=tuple(LR))
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="window lengths K")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3, help="processes per mode")
    parser.add_argument("--alternations", type=int, default=3, help="repetitions in a process")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--limit-gb",
        type=float,
        default=16.0,
        help="skip an unrolled mode that should take more, judged by the K before",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute")
    parser.add_argument("-o", "--output", type=Path, help="JSON with the figures of every process")
    parser.add_argument("--measure", metavar="MODE", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.model, arguments.steps, arguments.modes = "mlp", [3], list(QUICK)
        arguments.rounds = arguments.alternations = 1
    for mode in arguments.modes:
        if not re.fullmatch(MODE, mode):
            parser.error(f"unknown mode {mode!r}; the modes are: {' '.join(MODES)}")
    if any(mode.startswith("budget:") for mode in arguments.modes):
        # A share of something must know of what; higher refuses AdamW.
        needed = ["higher"] + ["torchopt"] * (arguments.optimizer == "adamw")
        arguments.modes = list(dict.fromkeys([*needed, *arguments.modes]))
    return arguments


def run_rounds(
    steps: int, arguments: argparse.Namespace, memory_of: dict[str, tuple[int, float]]
) -> dict[str, list[dict[str, Any]]]:
    """mode -> what its processes reported; `memory_of` is read, and brought up to this K."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in arguments.modes}
    expected = {mode: b * steps / k for mode, (k, b) in memory_of.items()}
    for turn in range(arguments.rounds):
        for mode, processes in found.items():
            if processes and processes[0]["status"] != "measured":
                continue
            if expected.get(mode, 0.0) > 1e9 * arguments.limit_gb:
                reason = f"about {expected[mode] / 1e9:.2g} GB, judged by the K before"
                processes.append({"status": "skipped", "reason": reason})
                continue
            print(f"K={steps}, round {turn + 1}: {mode}", file=sys.stderr, flush=True)
            processes.append(in_process(mode, steps, unrolled_memory(found, expected), arguments))
    for mode in UNROLLED:
        if memory := memory_above_plain(found.get(mode, [])):
            memory_of[mode] = (steps, memory)
    return found


def unrolled_memory(
    found: dict[str, list[dict[str, Any]]], expected: dict[str, float]
) -> float | None:
    """Bytes above plain of the unrolled graph: higher's, else torchopt's; else what is expected."""
    of_libraries = ("higher", "torchopt")
    measured = (memory_above_plain(found.get(mode, [])) for mode in of_libraries)
    return next((b for b in (*measured, *map(expected.get, of_libraries)) if b), None)


def memory_above_plain(processes: Sequence[dict[str, Any]]) -> float | None:
    figures = [p["bytes_above_plain"] for p in processes if p["status"] == "measured"]
    return statistics.median(figures) if figures else None


def in_process(
    mode: str, steps: int, unrolled: float | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a fresh process reports of one mode; a process that dies is a report too."""
    options: dict[str, Any] = {"measure": mode, "model": arguments.model, "steps": steps}
    options |= {"optimizer": arguments.optimizer, "alternations": arguments.alternations}
    options |= {"device": arguments.device, "threads": arguments.threads}
    if mode.startswith("budget:"):
        if unrolled is None:
            return {"status": "skipped", "reason": "no unrolled graph was measured"}
        options["budget"] = float(Fraction(mode.split(":")[1])) * unrolled
    command = [sys.executable, __file__]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        reason = last if done.returncode > 0 else f"killed by signal {-done.returncode}"
        return {"status": "failed", "reason": reason}
    return json.loads(done.stdout.splitlines()[-1])


def summarize(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per mode: medians over its processes."""
    measured = {
        mode: [p for p in processes if p["status"] == "measured"]
        for mode, processes in found.items()
    }
    reference = next((m for m in REFERENCES if measured.get(m)), None)
    rows: list[dict[str, Any]] = []
    for mode, processes in found.items():
        row = {"mode": mode, "status": processes[0]["status"]}
        rows.append(row)
        if not measured[mode]:
            row["reason"] = processes[0]["reason"]
            continue
        ratios = [statistics.median(p["seconds"]) / plain_seconds(p) for p in measured[mode]]
        last = measured[mode][-1]
        row |= {name: last[name] for name in ("resolved", "differentiated", "evaluations", "note")}
        row |= {
            "plain_steps": statistics.median(ratios),
            "plain_steps_range": [min(ratios), max(ratios)],
            "plain_steps_fresh": statistics.median(
                statistics.median(p["fresh_seconds"]) / plain_seconds(p) for p in measured[mode]
            ),
            "bytes_above_plain": memory_above_plain(processes),
            "plain_seconds": statistics.median(plain_seconds(p) for p in measured[mode]),
        }
        if reference and last["lr"]:
            row["reference"] = reference
            row["error"] = relative_error(last["lr"], measured[reference][-1]["lr"])
    return rows


def plain_seconds(process: dict[str, Any]) -> float:
    return statistics.median(process["plain_seconds"])


def relative_error(found: Sequence[float], expected: Sequence[float]) -> float:
    """|found − expected| / |expected|, in Euclidean norms."""
    difference = sum((f - e) ** 2 for f, e in zip(found, expected, strict=True)) ** 0.5
    return difference / max(sum(e**2 for e in expected) ** 0.5, 1e-300)


def table(steps: int, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Markdown."""
    seconds = [row["plain_seconds"] / steps for row in rows if "plain_seconds" in row]
    step = (
        f"{1e3 * statistics.median(seconds):.2f} ms ({1e3 * min(seconds):.2f}–"
        f"{1e3 * max(seconds):.2f} over the rows)"
        if seconds
        else "not measured"
    )
    reference = next((row["reference"] for row in rows if "reference" in row), "nothing")
    lines = [
        f"{arguments.model}, {arguments.optimizer}, K = {steps}; a plain step takes {step}; errors "
        f"are relative to {reference}",
        "",
        "| mode | differentiated | plain steps per step | fresh | MB above plain "
        "| gradients per step, as counted | error of dJ/dlr |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mode = row["mode"]
        if row["status"] != "measured":
            lines.append(f"| {mode} | {row['status']}: {row['reason']} | | | | | |")
            continue
        if row["resolved"] not in ("", mode):
            mode += f" → {row['resolved']}"
        low, high = row["plain_steps_range"]
        counted = "" if row["evaluations"] is None else f"{row['evaluations']:.2f}"
        error = ("0 (reference)" if row["mode"] == reference else f"{row['error']:.1e}") if (
            "error" in row
        ) else ""  # fmt: skip
        if row["note"]:
            error += f"; {row['note']}"
        lines.append(
            f"| {mode} | {row['differentiated']} | {row['plain_steps']:.2f} ({low:.2f}–{high:.2f}) "
            f"| {row['plain_steps_fresh']:.2f} | {row['bytes_above_plain'] / 1e6:.0f} | {counted} "
            f"| {error} |"
        )
    return "\n".join(lines)


def headline(arguments: argparse.Namespace) -> str:
    """The command, the machine and the versions: what it takes to run this again."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "torchopt", "higher", "rhc")}
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    if arguments.device == "cuda":
        import torch

        processor = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {processor}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"`{shlex.join(['python', *sys.argv])}`; {processor}, {os.cpu_count()} cores, "
        f"{arguments.threads} thread(s); Python {platform.python_version()}, "
        f"{' '.join(platform.libc_ver())}, {described} ({commit or 'no commit'})"
    )


# A measuring process ------------------------------------------------------------------------------


class Found(NamedTuple):
    """What looking back once found.

    lr: dJ/dlr of every step. differentiated: with respect to what. evaluations: gradients per step,
    the roll's included, as rhc counts them. resolved: what rhc chose. note: an outcome, a notice.
    """

    lr: list[float]
    differentiated: str
    evaluations: float | None = None
    resolved: str = ""
    note: str = ""


def measure(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times and peaks of plain training and of `mode`, taking turns in this process."""
    import torch

    from rhc.training import memory

    stack = ExitStack()
    stack.enter_context(memory.held(2**32))  # as a run has it from window to window
    torch.set_num_threads(arguments.threads)
    (steps,) = arguments.steps
    task = Task(arguments.model, arguments.optimizer, arguments.device, steps)
    look_back = looking_back(mode, task, arguments.budget)

    # Imports and the first touch of kernels are not what is measured: on single examples they are
    # done without leaving the heap any room for what is.
    small = [task.batch(1) for _ in range(2)]
    train(task, small)
    try:
        look_back(small)
    except Exception as error:  # the same call fails on the window: nothing to measure
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"status": "refused", "reason": reason}

    # Plain training's peak, before the mode has made the heap grow.
    peak_of_plain = timed(lambda: train(task, task.batches), task.device)[2]
    look_back(task.batches[:2])
    fresh, peaks = [], []
    for _ in range(2):
        found, duration, peak = timed(lambda: look_back(task.batches), task.device)
        fresh.append(duration)
        peaks.append(peak)
    look_back(task.batches)  # the heap as it is in the middle of a run
    plain = [timed(lambda: train(task, task.batches), task.device, fresh=False)[1]]
    seconds = []
    for _ in range(arguments.alternations):
        seconds.append(timed(lambda: look_back(task.batches), task.device, fresh=False)[1])
        plain.append(timed(lambda: train(task, task.batches), task.device, fresh=False)[1])
    return {
        "status": "measured",
        "seconds": seconds,
        "fresh_seconds": fresh,
        "plain_seconds": plain,
        "bytes_above_plain": max(peaks) - peak_of_plain,
        "peak_bytes": peaks,
        "plain_peak_bytes": peak_of_plain,
        **found._asdict(),
    }


def timed(
    function: Callable[[], Found], device: str, *, fresh: bool = True
) -> tuple[Found, float, int]:
    """(result, seconds, peak bytes while it ran). fresh: all free memory goes back before."""
    if fresh:
        reset_peak(device)
    else:
        settle(device)
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return result, time.perf_counter() - start, peak_bytes(device)


def settle(device: str) -> None:
    """What was left over and is still under way does not count as the next part's."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Free memory goes back first, so that the next part cannot hide in what others left."""
    settle(device)
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now
    except OSError:
        print("the peak cannot be set back: imports may hide some of it", file=sys.stderr)


def peak_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Task:
    """A model with its loss, its batches, and a way back to where it started."""

    def __init__(self, model: str, optimizer: str, device: str, steps: int) -> None:
        import torch
        from models import CASES

        torch.manual_seed(0)
        self.case = CASES[model]
        self.loss_fn = self.case.loss_fn
        self.device = device
        self.kind = optimizer
        self.model: nn.Module = self.case.model().to(device)
        self.start = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.batches = [self.batch() for _ in range(steps)]
        self.held_out = self.batch()

    def batch(self, *size: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.case.make_batch(*size)
        return inputs.to(self.device), targets.to(self.device)

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model at its first weights, and a new optimizer: where every measurement starts."""
        import torch

        self.model.load_state_dict(self.start)
        self.model.zero_grad()
        parameters = self.model.parameters()
        if self.kind == "sgd":
            return self.model, torch.optim.SGD(parameters, LR["sgd"], momentum=MOMENTUM)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.kind]
        return self.model, kind(parameters, LR[self.kind], betas=(MOMENTUM, BETA2))

    def controls(self, steps: int) -> dict[str, list[Tensor]]:
        """A leaf per control and step, for the graphs that are unrolled without rhc."""
        import torch

        values = {"lr": LR[self.kind], "momentum": MOMENTUM}
        return {
            name: [
                torch.tensor(value, device=self.device, requires_grad=True) for _ in range(steps)
            ]
            for name, value in values.items()
        }


def train(task: Task, batches: Sequence[Any]) -> Found:
    """Plain training."""
    model, optimizer = task.fresh()
    for batch in batches:
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
    return Found([], "nothing")


def looking_back(mode: str, task: Task, budget: float | None) -> Callable[[Sequence[Any]], Found]:
    """What `mode` does with a window's batches."""
    if mode == "plain":
        return lambda batches: train(task, batches)
    if mode == "higher":
        return lambda batches: with_higher(task, batches)
    if mode == "torchopt":
        return lambda batches: with_torchopt(task, batches)
    if mode == "auto":
        return lambda batches: with_rhc(task, batches, {})
    if mode.startswith("budget:"):
        if budget is None:
            raise ValueError(f"mode {mode!r} needs --budget BYTES")
        options: dict[str, Any] = {"product": "exact", "memory_budget": int(budget)}
        if mode.endswith(":memory"):
            options["spill"] = False
        return lambda batches: with_rhc(task, batches, options)
    segment, product = mode.split("/")
    lengths = {"root": lambda steps: round(steps**0.5), "all": lambda steps: steps}
    length = lengths.get(segment, lambda steps: min(int(segment), steps))
    return lambda batches: with_rhc(
        task, batches, {"segment": length(len(batches)), "product": product}
    )


def with_rhc(task: Task, batches: Sequence[Any], options: dict[str, Any]) -> Found:
    import rhc

    model, optimizer = task.fresh()
    found = rhc.hypergradient(
        model,
        optimizer,
        task.loss_fn,
        batches,
        controls={"lr": LR[task.kind], "momentum": MOMENTUM},
        terminal=lambda m: task.loss_fn(m, task.held_out),
        **options,
    )
    return Found(
        found.grad["lr"].tolist(),
        "lr, momentum of every step",
        1 + found.gradient_equivalents / len(batches),
        resolved(found),
        "" if found.result.successful else f"{found.result.name}: {found.result.message}",
    )


def resolved(found: Any) -> str:
    """Segment and product, and what the plan of a budget kept, spilled and rolled again."""
    words = [f"{found.segment}/{found.product}"]
    if (plan := getattr(found, "plan", None)) is not None and plan.budget is not None:
        for name in ("graphs", "kept", "spilled", "recomputed"):
            if count := getattr(plan, name, 0):
                words.append(f"{count} {name}")
        if not plan.fits:
            words.append("over its budget as planned")
    return ", ".join(words)


def with_higher(task: Task, batches: Sequence[Any]) -> Found:
    """higher's own unrolled graph."""
    import higher
    import torch

    model, optimizer = task.fresh()
    controls = task.controls(len(batches))
    objective: Any = 0.0
    with twice_differentiable(model):
        functional = higher.monkeypatch(model, copy_initial_weights=True)
        differentiable = higher.get_diff_optim(optimizer, model.parameters(), fmodel=functional)
        for t, batch in enumerate(batches):
            loss = task.loss_fn(functional, batch)
            objective = objective + loss
            lr, momentum = controls["lr"][t], controls["momentum"][t]
            if task.kind == "sgd":
                override: dict[str, list[Any]] = {"lr": [lr], "momentum": [momentum]}
            else:
                # higher adds eps to √v, torch to √v̂ = √v / √(1 − β2ᵗ).
                eps = 1e-8 * (1 - BETA2 ** (t + 1)) ** 0.5
                override = {"lr": [lr], "betas": [(momentum, BETA2)], "eps": [eps]}
            differentiable.step(loss, override=override)
        objective = objective + task.loss_fn(functional, task.held_out)
        leaves = [*controls["lr"], *controls["momentum"]]
        # The first momentum of SGD has nothing to act on.
        found = torch.autograd.grad(objective, leaves, allow_unused=True)
    return Found(as_floats(found[: len(batches)]), "lr, momentum of every step")


def with_torchopt(task: Task, batches: Sequence[Any]) -> Found:
    """torchopt's own unrolled graph: a MetaOptimizer whose lr is a schedule of tensors.

    SGD also takes its momentum as a tensor, one for all steps: rebuilt every step it would start
    its momentum anew. Betas must be floats.
    """
    import torch
    import torchopt

    model, _ = task.fresh()
    controls = task.controls(len(batches))
    momentum: Any = controls["momentum"][0]  # annotated as a float, but a tensor will do
    steered = [momentum] if task.kind == "sgd" else []
    start = torchopt.extract_state_dict(model, by="reference")
    schedule = lambda count: controls["lr"][int(count)]  # noqa: E731
    if task.kind == "sgd":
        differentiable = torchopt.MetaSGD(model, lr=schedule, momentum=momentum)
    else:
        kind = {"adam": torchopt.MetaAdam, "adamw": torchopt.MetaAdamW}[task.kind]
        # Without eps_root a unit that is never active, whose v is 0, makes everything NaN.
        differentiable = kind(model, lr=schedule, betas=(MOMENTUM, BETA2), eps_root=1e-30)
    objective: Any = 0.0
    try:
        with twice_differentiable(model):
            for batch in batches:
                loss = task.loss_fn(model, batch)
                objective = objective + loss
                differentiable.step(loss)
            objective = objective + task.loss_fn(model, task.held_out)
            leaves = [*controls["lr"], *steered]
            found = torch.autograd.grad(objective, leaves, allow_unused=True)
    finally:
        torchopt.recover_state_dict(model, start)  # it replaced the model's parameters
    what = "lr of every step" + (", one momentum for all" if steered else "")
    return Found(as_floats(found[: len(batches)]), what)


def as_floats(gradients: Sequence[Tensor | None]) -> list[float]:
    return [0.0 if g is None else float(g) for g in gradients]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Without kernels that cannot be differentiated twice: fused attention, cuDNN's RNNs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in model.modules())
    cudnn = torch.backends.cudnn.enabled and not recurrent
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=cudnn):
        yield


if __name__ == "__main__":
    main()
