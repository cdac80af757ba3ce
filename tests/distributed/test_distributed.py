"""Ranks that train together do what one process does with the rows of all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import SHARED, hypergradients, passed, sampled, shared_out, trained, weighed
from ranks import outputs, spawn
from runs import network
from safetensors.torch import load_file

from rhc.errors import InputError
from rhc.loop.agreement import straggler
from rhc.storage.checkpoint import CheckpointStore

CASES = [
    ("normed", "sgd", "exact", "even"),
    ("normed", "adamw", "exact", "uneven"),
    ("mlp", "adamw", "forward-difference", "uneven"),
    ("transformer", "adamw", "exact", "even"),
    ("transformer", "momentum", "central-difference", "even"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    """What two ranks find, each."""
    arguments = (json.dumps(CASES), json.dumps(RUNS), str(folder))
    return spawn(2, "rank_programs.py", "everything", *arguments, timeout=400)


def test_hypergradients_are_those_of_one_process(of_two: list[dict[str, Any]]) -> None:
    first, second = (found["hypergradients"] for found in of_two)
    for k, case in enumerate(CASES):
        alone = hypergradients(*case, alone=True)
        assert first[k] == second[k], case  # to the bit
        close(first[k], alone, case)


def test_data_weights_are_those_of_one_process(of_two: list[dict[str, Any]]) -> None:
    first, second = (found["weighed"] for found in of_two)
    alone = weighed(alone=True)
    assert first == second  # to the bit
    for name, expected in alone.items():
        if name.endswith("ended"):
            assert first[name] == expected == "successful", name
        else:
            found, whole = torch.tensor(first[name]), torch.tensor(expected)
            assert torch.allclose(found, whole, rtol=1e-6, atol=1e-7), name
    assert max(alone["weights"]) > 1.05


def test_passes_over_the_whole_run_are_those_of_one_process(of_two: list[dict[str, Any]]) -> None:
    first, second = (found["passed"] for found in of_two)
    alone = passed()
    assert first == second
    for name in ("passes", "losses"):
        found, whole = (torch.tensor(each[name], dtype=torch.float64) for each in (first, alone))
        assert torch.allclose(found, whole, rtol=1e-6, atol=1e-9), name
    assert alone["passes"][0][0]


RUNS: list[dict[str, Any]] = [
    {"optimizer": "sgd"},
    {"optimizer": "adamw", "product": "forward-difference"},
    {"optimizer": "adamw", "accumulate": 2, "clip_norm": 0.5, "steps": 20},
    {"optimizer": "sgd", "rewrite": False, "keep_best": True, "validate_every": 10},
]


def test_runs_end_as_one_process_does(of_two: list[dict[str, Any]]) -> None:
    """The training data's last batch has three rows, which two ranks cannot share evenly."""
    first, second = (found["runs"] for found in of_two)
    for k, case in enumerate(RUNS):
        alone = trained(**case, alone=True)
        assert first[k] == second[k], case
        found = first[k]
        if case.get("rewrite", True):
            assert "accepted" in found["windows"], case
        assert_same_run(found, alone)
        assert found["best_step"] == alone["best_step"], case
        for name, loss in alone["losses"].items():
            if name.startswith("average") and not case.get("rewrite", True):
                continue  # statistics of batches in another order: one process draws them too
            assert loss is None or abs(found["losses"][name] - loss) <= 1e-6 * loss, (case, name)


def test_ranks_agree_on_how_a_window_replays(of_two: list[dict[str, Any]]) -> None:
    """Replicated and shared out; a counter in the dark on rank 1 alone stops rewriting on both."""
    first, second = (found["replays"] for found in of_two)
    assert first == second
    for (replay, outcomes), (differs, none) in first:
        assert replay["equal"] and "accepted" in outcomes
        assert not differs["equal"] and differs["what"] == "the loss" and none == []


def assert_same_run(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6
) -> None:
    assert found["windows"] == expected["windows"]
    for kind in ("parameters", "buffers"):
        for a, b in zip(found[kind], expected[kind], strict=True):
            assert relative(a, b) <= tolerance, kind


def test_a_run_of_two_ranks_goes_on_with_one(of_two: list[dict[str, Any]], folder: Path) -> None:
    """Nothing is drawn in the model, so that it is the run of one process all along."""
    found = trained("sgd", str(folder / "halted"), alone=True)
    assert_same_run(found, trained("sgd", alone=True))


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_four(tmp_path: Path) -> None:
    spawn(2, "rank_programs.py", "halted", str(tmp_path / "run"))
    found = spawn(4, "rank_programs.py", "goes_on", str(tmp_path / "run"))
    assert found[0] == found[3]
    assert_same_run(found[0], trained("sgd", alone=True))


@pytest.mark.slow
def test_four_ranks_are_one_process_too() -> None:
    """A batch of three rows leaves a rank without any."""
    found = spawn(4, "rank_programs.py", "many_hypergradients", json.dumps(CASES[:4]))
    for k, case in enumerate(CASES[:4]):
        assert found[0][k] == found[1][k] == found[2][k] == found[3][k]
        close(found[0][k], hypergradients(*case, alone=True), case)
    found = spawn(4, "rank_programs.py", "many_runs", json.dumps(RUNS))
    for k, run in enumerate(RUNS):
        assert found[0][k] == found[3][k]
        assert_same_run(found[0][k], trained(**run, alone=True))


def test_what_goes_between_ranks_does_not_grow_with_the_window(
    of_two: list[dict[str, Any]],
) -> None:
    """A gradient's volume for every gradient and every product, and a few numbers."""
    found, other = (found["counted"] for found in of_two)
    assert found == other
    (size,), (tensors,) = found["size"], found["tensors"]
    for product in ("exact", "forward-difference"):
        short, long = found[product]
        a_step = (long - short) / 8
        assert 2 * size <= a_step <= 2 * (size + tensors + 1) + 10, product
        # Of a window: the terminal gradient, two gradients that are compared, and words.
        assert short - 4 * a_step <= 3 * size + 3000, product


def test_one_rank_is_not_as_the_others(of_two: list[dict[str, Any]], folder: Path) -> None:
    faults = [found["faults"] for found in of_two]
    for found in faults:
        # The mean of 0 and 4 on one, of 1 and 3 on both, and nothing where nobody has any.
        assert found["absent"] == [[2.0], [2.0], None]
        assert re.fullmatch(
            r"Unshared: rank 1 was started otherwise than rank 0 \(stride is 11, on rank 0 10; "
            r"window is 11, on rank 0 10\); start all ranks .*",
            found["configuration"],
        )
        assert 'versions.torch is "2.11", on rank 0 "2.10"' in found["versions"]
        assert "clip_norm is 2.0, on rank 0 1.0" in found["threshold"]
        assert found["parameters"].startswith(
            "RanksDiffer: rank 1 differs from rank 0 in parameters"
        )
        assert "window 1 (up to step 20)" in found["parameters"]
        assert found["nan"]["windows"].count("rewound") == 1
        assert found["nan"] == faults[0]["nan"]
        assert found["ddp"]["same"]
        assert any("DistributedDataParallel" in text for text in found["ddp"]["notices"])
        assert found["straggler"]
        assert any("by the rows of each rank alone" in text for text in found["statistics"])
        assert found["sampler"] == pytest.approx(sampled(alone=True), rel=1e-5)  # float32
    assert faults[0]["drawn"] != faults[1]["drawn"]  # dropout is each rank's own
    records = [json.loads(x) for x in (folder / "faults/windows.jsonl").read_text().splitlines()]
    assert [r["outcome"] for r in records] == faults[0]["nan"]["windows"]


def test_who_is_waited_for() -> None:
    assert straggler([8.0, 0.1, 7.0], 10.0) == 1
    assert straggler([0.1, 0.2, 0.1], 10.0) is None  # nobody waits
    assert straggler([6.0, 0.1, 1.0], 10.0) is None  # two are slow, or it is the network
    assert straggler([6.0, 6.0], 10.0) is None  # the network


def test_hypergradients_of_parameters_that_are_shared_out(of_two: list[dict[str, Any]]) -> None:
    """fully_shard on two ranks, by differences, beside exact products of one process."""
    first, second = (found["shared_out"] for found in of_two)
    alone = shared_out(alone=True)
    for name, expected in alone.items():
        found = first[name]
        assert found == second[name], name
        assert found["result"] == expected["result"], found
        tolerance = 1e-3 if name == "transformer" else 1e-6  # central; forward
        assert found["value"] == pytest.approx(expected["value"], rel=1e-9)
        for control, values in expected["grad"].items():
            assert relative(found["grad"][control], values) <= tolerance, (name, control)
        assert relative(found["norms"], expected["norms"]) <= tolerance, name
    assert "shared out" in first["transformer"]["why"]
    for text, word in zip(first["refused"], ("product 'exact'",), strict=True):
        assert word in text


def test_runs_of_parameters_that_are_shared_out(of_two: list[dict[str, Any]], folder: Path) -> None:
    """They end as one process does; stopped, they go on to the bit, and as one process too."""
    straight, resumed = of_two[0]["shared_runs"]
    assert straight == resumed
    alone = trained(alone=True, **SHARED)
    assert "accepted" in alone["windows"]
    assert_same_run(straight, alone)
    assert straight["best_step"] == alone["best_step"]


def test_every_rank_writes_its_own_parts(of_two: list[dict[str, Any]], folder: Path) -> None:
    """Of parameters, optimizer slots and the average; what is written by one alone is small."""
    last = folder / "shared/checkpoints/best"  # which the run ends with
    files = sorted((last / "shards").iterdir())
    assert [file.name[:11] for file in files] == ["shard-00001", "shard-00002"]
    own = [load_file(file) for file in files]
    straight = of_two[0]["shared_runs"][0]
    names = [n for n, _ in network(norm=False).named_parameters()]
    for i, name in enumerate(names):
        parts = [tensors[f"model.parameter.{name}"] for tensors in own]
        assert torch.cat(parts).flatten().tolist() == straight["parameters"][i]
        assert len(parts[0]) > len(parts[1]) or len(parts[0]) == len(parts[1])
        for other in (f"optimizer.slot.{i}.exp_avg", f"optimizer.slot.{i}.exp_avg_sq"):
            assert [t[other].shape for t in own] == [part.shape for part in parts]
        assert [t[f"average.{i}"].shape for t in own] == [part.shape for part in parts]
    assert not (last / "average.safetensors").exists() or not load_file(
        last / "average.safetensors"
    )
    assert all(t.numel() == 1 for t in load_file(last / "optimizer.safetensors").values())
    manifest = json.loads((last / "manifest.json").read_text())
    assert {f"shards/{file.name}" for file in files} <= manifest["files"].keys()


def test_parts_are_put_together_by_another_number_of_ranks(
    of_two: list[dict[str, Any]], folder: Path
) -> None:
    found = trained(alone=True, directory=str(folder / "shared_halted"), **SHARED)
    assert_same_run(found, trained(alone=True, **SHARED), 1e-7)


@pytest.mark.slow
def test_parts_go_from_two_ranks_to_four_and_back(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    spawn(2, "rank_programs.py", "shared_until", directory, "25")
    spawn(4, "rank_programs.py", "shared_until", directory, "35")
    found = spawn(2, "rank_programs.py", "shared_until", directory, "1000")
    assert found[0] == found[1]
    assert_same_run(found[0], trained(alone=True, **SHARED), 1e-7)


def test_a_disk_that_takes_no_part_of_one_rank_stops_no_training(
    of_two: list[dict[str, Any]], folder: Path
) -> None:
    first, second = (found["refused_once"] for found in of_two)
    assert first["run"] == second["run"] == of_two[0]["shared_runs"][0]
    assert any("older checkpoints are removed to make room" in x for x in first["notices"]), first
    steps = [p.name for p in sorted((folder / "refused/checkpoints").iterdir())]
    assert steps[-1] == "window-00000050" and not [name for name in steps if name[0] == "."]


def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    found = outputs(2, "rank_programs.py", "killed", str(directory))
    assert found[1][0] == -9 and found[0][0] != 0
    names = sorted(p.name for p in (directory / "checkpoints").iterdir())
    assert names == [".writing-window-00000020", "best", "window-00000000", "window-00000010"]
    assert_same_run(
        trained(alone=True, directory=str(directory), **SHARED),
        trained(alone=True, **SHARED),
        1e-7,
    )


def test_shards_that_were_altered_are_passed_over(
    of_two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """One byte, one file too many, one too few, a link: the checkpoint before is taken."""
    store = CheckpointStore(tmp_path)
    for damage in ("byte", "more", "fewer", "link"):
        copy = tmp_path / "window-00000050"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "shared/checkpoints/window-00000050", copy)
        assert store.load(50).shards
        first = copy / "shards/shard-00001-model-00001-of-00001.safetensors"
        if damage == "byte":
            data = bytearray(first.read_bytes())
            data[-1] ^= 1
            first.write_bytes(data)
        elif damage == "more":
            shutil.copy(first, copy / "shards/shard-00003-model-00001-of-00001.safetensors")
        elif damage == "fewer":
            first.unlink()
        else:
            (copy / "shards").rename(tmp_path / "elsewhere")
            (copy / "shards").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"shards.* does not match its manifest"):
            store.load(50)


def relative(found: list[float], expected: list[float]) -> float:
    a, b = double(found), double(expected)
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: dict[str, Any], expected: dict[str, Any], case: Any) -> None:
    assert found["result"] == expected["result"], case
    assert abs(found["value"] - expected["value"]) <= 1e-9 * abs(expected["value"]), case
    for name, values in expected["grad"].items():
        assert relative(found["grad"][name], values) <= 1e-6, (case, name)
    assert relative(found["norms"], expected["norms"]) <= 1e-6, case
