"""Runners: what they hand over, how they are found, and what they say when something is missing."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rhc
from rhc.errors import InputError
from rhc.loop.update_rule import Rewrite
from rhc.workload import Workload, available_runners, load_runner, runner_summary
from runners.auxiliary import auxiliary
from runners.char_lm import char_lm
from runners.data import read_idx, split, tensor_loader
from runners.digits import digits
from runners.drifting_sine import drifting_sine
from runners.ill_scaled import SCALES, ill_scaled
from runners.long_tail_mnist import long_tail_mnist
from runners.mixed_text import mixed_text
from runners.mnist import mnist
from runners.mnist_cnn import mnist_cnn
from runners.noisy_mnist import noisy_mnist
from runners.shifting_mnist import shifting_mnist
from runners.sine import sine

Runner = Callable[..., Workload]

# What a runner hands over


def train(workload: Workload, steps: int, lr: float) -> tuple[float, float]:
    """Validation loss before and after plain SGD steps."""
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=lr)
    before = validation_loss(workload)
    batches = iter(workload.train_loader)
    for _ in range(steps):
        optimizer.zero_grad()
        scalar_loss(workload, next(batches)).backward()
        optimizer.step()
    return before, validation_loss(workload)


def validation_loss(workload: Workload) -> float:
    assert workload.val_loader is not None
    with torch.no_grad():
        losses = [scalar_loss(workload, batch) for batch in workload.val_loader]
    return torch.stack(losses).mean().item()


def scalar_loss(workload: Workload, batch: object) -> Tensor:
    outcome = workload.loss_fn(workload.model, batch)
    return outcome[0] if isinstance(outcome, tuple) else outcome


def examples(loader: object) -> int:
    assert isinstance(loader, DataLoader)
    return len(loader.dataset)  # type: ignore[arg-type]


def test_digits_hands_over_real_digits() -> None:
    torch.manual_seed(0)
    workload = digits(seed=0)
    images, labels = next(iter(workload.train_loader))
    assert images.shape == (64, 64) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert labels.shape == (64,) and labels.dtype == torch.int64
    loss, metrics = workload.loss_fn(workload.model, (images, labels))
    assert loss.shape == () and loss.isfinite()
    assert 0 <= metrics["accuracy"] <= 1 and not metrics["accuracy"].requires_grad
    loaders = (workload.train_loader, workload.val_loader, workload.test_loader)
    assert [examples(loader) for loader in loaders] == [1100, 300, 397]


@pytest.mark.parametrize(("runner", "below"), [(digits, 0.9), (sine, 0.8)])
def test_a_few_sgd_steps_lower_the_validation_loss(runner: Runner, below: float) -> None:
    torch.manual_seed(0)
    before, after = train(runner(seed=0), steps=15, lr=0.1)
    assert after < below * before


@pytest.mark.parametrize("runner", [digits, sine])
def test_weights_depend_on_the_callers_seed_and_data_do_not(runner: Runner) -> None:
    def make(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        workload = runner(seed=seed)
        assert workload.test_loader is not None
        (test_batch,) = workload.test_loader
        return nn.utils.parameters_to_vector(workload.model.parameters()), test_batch

    weights, test_batch = make(1)
    same_weights, _ = make(1)
    other_weights, other_test_batch = make(2)
    assert torch.equal(weights, same_weights)
    assert not torch.equal(weights, other_weights)
    assert all(torch.equal(a, b) for a, b in zip(test_batch, other_test_batch, strict=True))


@pytest.mark.parametrize("runner", [digits, sine])
def test_a_runner_draws_nothing_but_its_weights_from_the_global_generator(runner: Runner) -> None:
    torch.manual_seed(0)
    workload = runner(seed=0)
    after_runner = torch.get_rng_state()
    torch.manual_seed(0)
    for layer in workload.model.modules():
        if isinstance(layer, nn.Linear):
            nn.Linear(layer.in_features, layer.out_features)
    assert torch.equal(torch.get_rng_state(), after_runner)


@pytest.mark.parametrize("runner", [digits, sine])
def test_data_that_would_be_ignored_is_refused(runner: Runner) -> None:
    with pytest.raises(InputError, match=r"takes no data, got --data x: leave --data out"):
        runner(data=Path("x"))


def test_digits_says_how_to_get_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'rhc\[runners\]'"):
        digits()


# Loaders and splits


def test_tensor_loader_shuffles_every_pass_and_drops_a_partial_batch() -> None:
    torch.manual_seed(0)
    rows = torch.arange(10)
    loader = tensor_loader((rows, -rows), 4, shuffle=True)
    passes = [torch.cat([a for a, _ in loader]) for _ in range(2)]
    assert len(loader) == 2
    assert all(len(seen) == len(seen.unique()) == 8 for seen in passes)
    assert not torch.equal(*passes)
    assert all(torch.equal(a, -b) for a, b in loader)

    torch.manual_seed(0)
    assert torch.equal(torch.cat([a for a, _ in loader]), passes[0])


def test_tensor_loader_keeps_order_and_every_row_without_shuffle() -> None:
    rows = torch.arange(10)
    batches = [batch for (batch,) in tensor_loader((rows,), 4, shuffle=False)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), rows)


def test_split_is_disjoint_and_that_of_seed_zero() -> None:
    rows = torch.arange(10)
    (first,), (second,) = split((rows,), (6, 4))
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([first, second]), expected)
    assert len(first) == 6


# The IDX format


def idx_bytes(array: Tensor) -> bytes:
    header = struct.pack(f">HBB{array.dim()}I", 0, 0x08, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def write_mnist(folder: Path, prefix: str, count: int, *, compress: bool) -> tuple[Tensor, Tensor]:
    """A pair of files of random images and labels; returns what was written."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(content, mtime=0) if compress else content)
    return images, labels


def test_read_idx_returns_what_was_written(tmp_path: Path) -> None:
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    path = tmp_path / "array"
    path.write_bytes(idx_bytes(array))
    assert torch.equal(read_idx(path), array)
    path.write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    assert torch.equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("code", "format_", "dtype"),
    [
        (0x08, "B", torch.uint8),
        (0x09, "b", torch.int8),
        (0x0B, "h", torch.int16),
        (0x0C, "i", torch.int32),
        (0x0D, "f", torch.float32),
        (0x0E, "d", torch.float64),
    ],
)
def test_read_idx_knows_every_element_type(
    tmp_path: Path, code: int, format_: str, dtype: torch.dtype
) -> None:
    path = tmp_path / "array"
    path.write_bytes(struct.pack(f">HBBI3{format_}", 0, code, 1, 3, 1, 2, 100))
    assert torch.equal(read_idx(path), torch.tensor([1, 2, 100], dtype=dtype))


VALID = idx_bytes(torch.zeros(2, 3))
ZIPPED = gzip.compress(VALID, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: it starts with nothing"),
        (b"\0\0\x08", "is not an IDX file: it starts with 000008 where"),
        (b"<html>no such file", "is not an IDX file: it starts with 3c68746d where"),
        (b"\0\0\x07\x01" + VALID[4:], "is not an IDX file: it starts with 00000701"),
        (b"\0\0\x08\x00" + VALID[4:], "is not an IDX file: it starts with 00000800"),
        (VALID[:10], "is cut short: 10 bytes, where the header alone has 12; fetch it again"),
        (VALID[:-1], r"holds 5 bytes of data where its header, \(2, 3\) of uint8, promises 6"),
        (VALID + b"\0", r"holds 7 bytes of data where its header, \(2, 3\) of uint8, promises 6"),
        (ZIPPED[:-9], r"is damaged gzip \(.*\); fetch it again"),
        (ZIPPED[:-8] + b"\0" * 8, r"is damaged gzip \(CRC check failed"),
        (
            ZIPPED[:10] + b"\xff" * 20,
            r"is damaged gzip \(.*\); fetch it again",
        ),
    ],
)
def test_read_idx_names_the_file_and_the_fault(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "broken-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"broken-idx3-ubyte {message}"):
        read_idx(path)


def test_read_idx_says_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); check the file"):
        read_idx(tmp_path)


# MNIST


def test_mnist_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got no folder: give --data DIR"):
        mnist()
    with pytest.raises(InputError, match=r"--data .*absent is not a folder: give the one"):
        mnist(data=tmp_path / "absent")
    with pytest.raises(InputError, match=r"has neither t10k-images-idx3-ubyte nor .*\.gz: give"):
        mnist(data=tmp_path)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_splits_the_test_files_where_they_are_alone(tmp_path: Path, compress: bool) -> None:
    images, labels = write_mnist(tmp_path, "t10k", 200, compress=compress)
    workload = mnist(data=tmp_path)
    assert mnist_sizes(workload) == [140, 30, 30]

    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[-30:]
    assert workload.test_loader is not None
    ((test_images, test_labels),) = workload.test_loader
    assert torch.equal(test_labels, labels[order].long())
    expected = (images[order].flatten(1).float() / 255 - 0.1307) / 0.3081
    assert torch.equal(test_images, expected)


def test_mnist_uses_the_training_files_where_they_are(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 1200, compress=True)
    _, labels = write_mnist(tmp_path, "t10k", 200, compress=False)
    workload = mnist(data=tmp_path)
    assert mnist_sizes(workload) == [1100, 100, 200]
    assert workload.test_loader is not None
    ((_, test_labels),) = workload.test_loader
    assert torch.equal(test_labels, labels.long())


def test_mnist_does_not_pass_over_half_a_training_set(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 200, compress=True)
    write_mnist(tmp_path, "t10k", 200, compress=True)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError, match="has neither train-images-idx3-ubyte nor"):
        mnist(data=tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("images-idx3", torch.zeros(200, 20, 20), r"\(200, 20, 20\) of torch.uint8 where MNIST"),
        ("images-idx3", torch.zeros(199, 28, 28), "199 images and t10k-labels.* 200 labels; fetch"),
        ("labels-idx1", torch.zeros(200, 1), r"\(200, 1\) of torch.uint8 where MNIST has \(N,\)"),
        ("labels-idx1", torch.full((200,), 10), "each from 0 to 9; fetch MNIST's own file"),
    ],
)
def test_mnist_checks_what_the_files_hold(
    tmp_path: Path, name: str, array: Tensor, message: str
) -> None:
    write_mnist(tmp_path, "t10k", 200, compress=False)
    (tmp_path / f"t10k-{name}-ubyte").write_bytes(idx_bytes(array))
    with pytest.raises(InputError, match=message):
        mnist(data=tmp_path)


def test_mnist_needs_enough_images_for_a_batch(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 20, compress=False)
    with pytest.raises(InputError, match="has 20 images, too few for batches of 64"):
        mnist(data=tmp_path)


def test_mnist_10k_on_the_real_files(data_dir: Path) -> None:
    folder = data_dir / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST files in {folder}: set RHC_DATA to a folder with mnist/ in it")
    torch.manual_seed(0)
    workload = mnist(data=folder)
    if not any(folder.glob("train-images*")):
        assert mnist_sizes(workload) == [7000, 1500, 1500]
    before, after = train(workload, steps=30, lr=0.05)
    assert after < 0.8 * before


def mnist_sizes(workload: Workload) -> list[int]:
    loaders = (workload.train_loader, workload.val_loader, workload.test_loader)
    return [examples(loader) for loader in loaders]


# CartPole: playing is part of the loss function, and a function of weights and batch


@pytest.fixture
def cartpole() -> Workload:
    pytest.importorskip("gymnasium")
    from runners.cartpole import cartpole as make

    torch.manual_seed(0)
    return make(seed=0)


def test_cartpole_plays_the_same_episodes_from_the_same_weights(cartpole: Workload) -> None:
    batch, other, *_ = list(cartpole.train_loader)
    before = torch.get_rng_state()
    (loss, metrics), (again, _) = (cartpole.loss_fn(cartpole.model, batch) for _ in range(2))
    assert torch.equal(loss, again) and torch.equal(torch.get_rng_state(), before)
    assert 8 <= metrics["return"] <= 500
    _, seen = cartpole.loss_fn(cartpole.model, other)
    assert seen["return"] != metrics["return"]
    first_pass, second_pass = (list(cartpole.train_loader) for _ in range(2))
    assert not torch.equal(first_pass[0], second_pass[0])  # every pass has episodes of its own
    # What was played in between leaves nothing behind.
    assert torch.equal(cartpole.loss_fn(cartpole.model, batch)[0], loss)
    validation = next(iter(cartpole.val_loader or ()))
    assert not set(batch.tolist()) & set(validation.tolist())


def test_the_return_of_cartpole_is_that_of_the_game_itself(cartpole: Workload) -> None:
    """Played anew with gymnasium's own single environment, from the same first states."""
    import gymnasium

    from runners.cartpole import _play

    batch = next(iter(cartpole.train_loader))
    vector = gymnasium.make_vec("CartPole-v1", num_envs=4, vectorization_mode="vector_entry_point")
    seen, actions, playing = _play(vector, cartpole.model, batch)
    for episode in range(4):
        game = gymnasium.make("CartPole-v1")
        game.reset(seed=0)
        game.unwrapped.state = seen[0, episode].double().numpy()
        length = int(playing[:, episode].sum())
        for step in range(length):
            state, _, fell, ended, _ = game.step(int(actions[step, episode]))
            assert (fell or ended) == (step == length - 1)
            if step < length - 1:
                assert torch.allclose(seen[step + 1, episode], torch.from_numpy(state), atol=1e-4)


def test_the_gradient_of_cartpole_is_that_of_reinforce(cartpole: Workload) -> None:
    """Written out with loops: advantages from discounted returns and the baseline, normalised."""
    from runners.cartpole import _environment, _play

    model, batch = cartpole.model, next(iter(cartpole.train_loader))
    cartpole.loss_fn(model, batch)[0].backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    seen, actions, playing = _play(_environment(), model, batch)
    errors, likelihoods = [], []
    for episode in range(playing.shape[1]):
        length = int(playing[:, episode].sum())
        for step in range(length):
            logit, baseline = model(seen[step, episode])
            chance = torch.sigmoid(logit)
            likelihoods.append(torch.log(chance if actions[step, episode] else 1 - chance))
            errors.append(0.01 * sum(0.99**k for k in range(length - step)) - baseline)
    error = torch.stack(errors)
    advantage = (error - error.mean()).detach()
    advantage = advantage / (advantage.square().mean().sqrt() + 1e-6)
    model.zero_grad()
    (error.square().mean() - (advantage * torch.stack(likelihoods)).mean()).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_rewritten_run_of_cartpole_is_the_plain_loop_of_its_schedule(cartpole: Workload) -> None:
    from rhc import Runner

    model, settings = cartpole.model, {"start": "given", "window": 3}
    first = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[Tensor] = []

    def noted(model: nn.Module, batch: Tensor) -> object:
        seen.append(batch)
        return cartpole.loss_fn(model, batch)

    law = Rewrite(step={"lr": 0.5}, accept=False, until=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rewritten = Runner(model, optimizer, noted, cartpole.train_loader, rewrite=law, **settings).fit(
        6
    )
    lrs = [row["lr"] for row in rewritten.tape]
    assert len(set(map(str, lrs))) > 1 and len(seen) > 12
    batches = {batch[0].item(): batch for batch in seen}
    model.load_state_dict(first)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for row, batch in zip(rewritten.tape, batches.values(), strict=False):
        optimizer.param_groups[0]["lr"] = (
            row["lr"] if isinstance(row["lr"], float) else row["lr"][0]
        )
        loss, metrics = cartpole.loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert (loss.item(), metrics["return"].item()) == (row["loss"], row["return"])


def test_cartpole_without_gymnasium_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    from runners.cartpole import cartpole as make

    with pytest.raises(InputError, match="needs gymnasium: pip install"):
        make()
    with pytest.raises(InputError, match="takes no data"):
        make(data=Path("x"))


# How a runner is found


def test_ready_made_runners_are_installed_with_their_summaries() -> None:
    runners = available_runners()
    assert {"digits", "mnist", "sine"} <= set(runners)
    assert runners["digits"].endswith("runners.digits:digits")
    assert runner_summary(runners["digits"]).startswith("Real handwritten digits")
    assert all(runner_summary(runners[name]) for name in ("digits", "mnist", "sine"))


def test_two_packages_that_claim_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        metadata.EntryPoint("digits", f"{package}:digits", "rhc.runners") for package in ("a", "b")
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    with pytest.raises(InputError, match="'digits' is claimed by both a:digits and b:digits: unin"):
        available_runners()


def test_summary_is_empty_where_there_is_none_to_be_read() -> None:
    for target in ("absent.module:f", "runners.absent:f", "runners.digits:absent", "sys:exit"):
        assert runner_summary(target) == ""


def test_listing_runners_does_not_import_torch() -> None:
    program = (
        "import sys, rhc.workload as w\n"
        "assert [w.runner_summary(t) for t in w.available_runners().values()]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_load_runner_by_name() -> None:
    from rhc.runners.sine import sine as packaged

    assert load_runner("sine").__wrapped__ is packaged  # type: ignore[attr-defined]
    assert isinstance(load_runner("sine")(seed=0, data=None), Workload)


def test_an_unknown_runner_is_told_its_neighbours() -> None:
    names = ", ".join(available_runners())
    tail = f"there are: {names}; or give path/to/file.py:function"
    with pytest.raises(InputError) as raised:
        load_runner("digts")
    assert str(raised.value) == f"unknown runner 'digts': did you mean 'digits'? {tail}"
    with pytest.raises(InputError) as raised:
        load_runner("zzzzzz")
    assert str(raised.value) == f"unknown runner 'zzzzzz': {tail}"


@pytest.fixture
def runner_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("RUNNER = 'sine'\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from neighbour_of_mine import RUNNER\n"
        "from rhc.workload import load_runner\n"
        "CONSTANT = 1\n"
        "def good(*, seed=0, data=None): return load_runner(RUNNER)(seed=seed, data=data)\n"
        "def returns_none(*, seed=0, data=None): pass\n"
        "def takes_nothing(): pass\n"
    )
    return path


def test_load_runner_from_a_file(runner_file: Path) -> None:
    assert isinstance(load_runner(f"{runner_file}:good")(seed=0, data=None), Workload)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":absent", r"mine.py defines no function 'absent': give .*mine.py:function with"),
        (":CONSTANT", r"mine.py defines no function 'CONSTANT': give"),
        ("", r"mine.py defines no function 'mine': give .* such as "),
        (":takes_nothing", r"cannot be called with seed and data .*: define it with"),
    ],
)
def test_load_runner_from_a_file_says_what_is_wrong(
    runner_file: Path, suffix: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_runner(f"{runner_file}{suffix}")


def test_a_runner_must_return_a_workload(runner_file: Path) -> None:
    runner = load_runner(f"{runner_file}:returns_none")
    with pytest.raises(InputError, match=r"returned NoneType: return an rhc.workload.Workload"):
        runner(seed=0, data=None)


def test_load_runner_from_a_missing_file() -> None:
    with pytest.raises(InputError, match=r"there is no file absent.py in .*: correct the path"):
        load_runner("absent.py:f")


def test_ill_scaled_is_the_ordinary_mlp_in_other_units(tmp_path: Path) -> None:
    """The same function at first; gradients of a layer are multiplied by its scale."""
    write_mnist(tmp_path, "t10k", 200, compress=False)
    torch.manual_seed(3)
    ordinary = mnist(seed=3, data=tmp_path)
    torch.manual_seed(3)
    scaled = ill_scaled(seed=3, data=tmp_path)
    (batch,) = list(scaled.val_loader or [])
    losses = [scalar_loss(workload, batch) for workload in (ordinary, scaled)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    for loss in losses:
        loss.backward()
    assert scaled.parameter_groups is not None and len(scaled.parameter_groups) == len(SCALES)
    plain = list(ordinary.model.parameters())
    for group, scale, of_layer in zip(
        scaled.parameter_groups, SCALES, zip(plain[::2], plain[1::2], strict=True), strict=True
    ):
        for p, q in zip(group["params"], of_layer, strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.allclose(p * scale, q, rtol=1e-6)
            assert torch.allclose(p.grad, q.grad * scale, rtol=1e-4, atol=1e-7)


def test_char_lm_learns_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    torch.manual_seed(0)
    workload = char_lm(data=tmp_path)
    torch.manual_seed(0)
    again = char_lm(data=path)
    batches = [next(iter(w.train_loader)) for w in (workload, again)]
    assert batches[0][0].shape == (16, 65)
    model, other = workload.model, again.model
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    before = validation_loss(workload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in workload.train_loader:
            optimizer.zero_grad()
            scalar_loss(workload, batch).backward()
            optimizer.step()
    assert validation_loss(workload) < 0.8 * before


def test_char_lm_sees_the_past_only(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 500, encoding="utf-8")
    model = char_lm(data=tmp_path).model
    codes = torch.randint(8, (2, 64))
    changed = codes.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 8
    assert torch.allclose(model(codes)[:, :40], model(changed)[:, :40], atol=1e-6)


def test_char_lm_needs_a_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a text and got none"):
        char_lm()
    with pytest.raises(InputError, match=r"has no \.txt files"):
        char_lm(data=tmp_path)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match="9 characters, too few"):
        char_lm(data=tmp_path)
    (tmp_path / "short.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8"):
        char_lm(data=tmp_path)


# Data that shift


def test_the_sine_jumps_at_steps_that_the_seed_decides() -> None:
    torch.manual_seed(0)
    first, second = drifting_sine(seed=0), drifting_sine(seed=1)
    jumps = [workload.train_loader.jumps for workload in (first, second)]  # type: ignore[attr-defined]
    assert jumps[0] != jumps[1]
    for found in jumps:
        assert all(300 + 400 * i <= jump <= 500 + 400 * i for i, jump in enumerate(found))
    curves = [batch[2] for _, batch in zip(range(1500), first.train_loader, strict=False)]
    changes = [t for t in range(1, 1500) if not torch.equal(curves[t], curves[t - 1])]
    assert changes == jumps[0]
    # Endless, the same at every pass, and noise of the size that is said.
    again = [batch for _, batch in zip(range(3), first.train_loader, strict=False)]
    once = [batch for _, batch in zip(range(3), first.train_loader, strict=False)]
    for a, b in zip(again, once, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    x, y, _ = (torch.cat(parts) for parts in zip(*again, strict=True))
    assert (y - torch.sin(x)).std().item() == pytest.approx(0.1, rel=0.2)


def test_tracking_is_the_distance_to_the_curve() -> None:
    torch.manual_seed(0)
    workload = drifting_sine(seed=0)
    batch = next(iter(workload.train_loader))
    _, metrics = workload.loss_fn(workload.model, batch)
    grid = torch.linspace(-torch.pi, torch.pi, 128)[:, None]
    with torch.no_grad():
        expected = (workload.model(grid) - torch.sin(grid)).square().mean()
    assert metrics["tracking"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not metrics["tracking"].requires_grad
    with pytest.raises(InputError, match="takes no data"):
        drifting_sine(data=Path("x"))


def test_pixels_and_then_labels_of_mnist_change_places(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 2000, compress=False)
    torch.manual_seed(0)
    workload = shifting_mnist(seed=0, data=tmp_path)
    shifts = workload.train_loader.shifts  # type: ignore[attr-defined]
    assert 320 <= shifts.pixels_at <= 480 and 720 <= shifts.labels_at <= 880
    images, labels = torch.randn(5, 784), torch.arange(5)
    same = shifts.apply(shifts.pixels_at - 1, images, labels)
    assert torch.equal(same[0], images) and torch.equal(same[1], labels)
    moved = shifts.apply(shifts.pixels_at, images, labels)
    assert torch.equal(moved[0], images[:, shifts.pixels]) and torch.equal(moved[1], labels)
    last = shifts.apply(shifts.labels_at, images, labels)
    assert torch.equal(last[1], shifts.labels[labels])
    assert workload.parameter_groups is not None and len(workload.parameter_groups) == 3
    # A permutation of what goes in, and of what comes out, is undone by one layer alone.
    first, final = (m for i, m in enumerate(workload.model.children()) if i in (0, 4))
    _, before = workload.loss_fn(workload.model, (images, labels, images, labels))
    with torch.no_grad():
        first.weight.copy_(first.weight[:, shifts.pixels].clone())  # type: ignore[operator, union-attr, index]
        for p in final.parameters():
            p[shifts.labels] = p.clone()
    _, after = workload.loss_fn(workload.model, (*last, *last))
    assert after["tracking"].item() == pytest.approx(before["tracking"].item(), rel=1e-5)


def test_watched_images_are_never_trained_on(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 2000, compress=False)
    torch.manual_seed(0)
    workload = shifting_mnist(seed=0, data=tmp_path)
    batches = [batch for _, batch in zip(range(30), workload.train_loader, strict=False)]
    trained = {tuple(row[:200].tolist()) for batch in batches for row in batch[0]}
    watched = {tuple(row[:200].tolist()) for batch in batches for row in batch[2]}
    assert not trained & watched and len(watched) > 250
    assert workload.val_loader is None and examples(workload.test_loader) == 300


def test_the_convolutional_network_trains(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 500, compress=False)
    torch.manual_seed(0)
    workload = mnist_cnn(seed=0, data=tmp_path)
    loss, metrics = workload.loss_fn(workload.model, next(iter(workload.train_loader)))
    assert loss.isfinite() and 0 <= metrics["accuracy"] <= 1
    assert workload.optimizer == "adamw" and workload.steps == 600


WITH_A_DATASET = """
import dataclasses, sys

@dataclasses.dataclass
class Rows:
    size: int
    def __len__(self): return self.size

class Own(Rows): pass

def go(*, seed=0, data=None): return Rows(3)
"""


@pytest.mark.parametrize("name", ["my_run.py", "a 50%.run.py", "random.py"])
def test_what_a_runner_file_defines_is_found_in_another_process(tmp_path: Path, name: str) -> None:
    """As a spawned worker of a DataLoader does, which has sys.path and nothing else."""
    (tmp_path / name).write_text(WITH_A_DATASET)
    rows = load_runner(f"{tmp_path / name}:go").__wrapped__()  # type: ignore[attr-defined]
    paths = [p for p in sys.path if p != str(tmp_path)]
    read = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer)))"
    found = subprocess.run(
        [sys.executable, "-c", read], input=pickle.dumps(rows), capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert (found.stdout.decode().strip(), found.stderr.decode()) == ("3", "")


def test_a_runner_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    for value in (1, 22):
        path.write_text(f"def go(*, seed=0, data=None): return {value}")
        assert load_runner(f"{path}:go").__wrapped__() == value  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_spawned_workers_of_a_runner_file(tmp_path: Path, context: str) -> None:
    (tmp_path / "my_run.py").write_text(
        f"""
import torch
from torch.utils.data import DataLoader, Dataset
from rhc import Workload

class Rows(Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return torch.full((4,), i / 64.0)

def go(*, seed=0, data=None):
    train = DataLoader(Rows(), 32, num_workers=1, multiprocessing_context="{context}")
    loss_fn = lambda model, batch: model(batch).square().mean()
    return Workload(torch.nn.Linear(4, 1), loss_fn, train, steps=4, threads=1)
"""
    )
    line = ["-m", "rhc", "train", "my_run.py:go", "--no-rewrite", "--lr", "0.05"]
    done = subprocess.run([sys.executable, *line], cwd=tmp_path, capture_output=True, timeout=200)
    assert (done.returncode, done.stderr.decode()) == (0, "")


# What data weights are for


def weighed_run(workload: Workload, steps: int = 10) -> rhc.RunResult:
    assert workload.data_weights is not None
    return rhc.Runner(
        workload.model,
        torch.optim.SGD(workload.model.parameters(), 0.01, momentum=0.9),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        window=5,
        start="given",
        controls=(),
        product="none",
        data_weights=workload.data_weights,
    ).fit(steps)


def test_noisy_mnist_has_the_same_wrong_labels_for_every_seed(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 2000, compress=False)

    def given(**options: Any) -> Tensor:
        loader = noisy_mnist(data=tmp_path, **options).train_loader
        return loader.dataset.dataset.tensors[1]  # type: ignore[attr-defined]

    right = given(noise=0.0)
    assert torch.equal(given(seed=0), given(seed=1))
    assert 0.3 < float((given() != right).float().mean()) < 0.42
    moved = given(noise=0.3, noise_kind="class")
    assert set(((moved - right) % 10).tolist()) == {0, 1}
    clean = noisy_mnist(data=tmp_path).val_loader.dataset.tensors[1]  # type: ignore[union-attr]
    noisy = noisy_mnist(data=tmp_path, held_out="noisy").val_loader
    assert 0.2 < float((noisy.dataset.tensors[1] != clean).float().mean()) < 0.5  # type: ignore[union-attr]
    with pytest.raises(InputError, match="noise_kind must be symmetric or class"):
        noisy_mnist(data=tmp_path, noise_kind="x")


@pytest.mark.parametrize("cells", ["classes", "rows"])
def test_long_tail_mnist_has_fewer_rows_of_later_classes(tmp_path: Path, cells: str) -> None:
    write_mnist(tmp_path, "t10k", 2000, compress=False)
    workload = long_tail_mnist(data=tmp_path, imbalance=20, cells=cells)
    labels = workload.train_loader.dataset.dataset.tensors[1]  # type: ignore[attr-defined]
    sizes = labels.bincount(minlength=10).tolist()
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= 15 * sizes[-1]
    weights = weighed_run(workload).data_weights
    assert weights is not None and len(weights) == (10 if cells == "classes" else len(labels))
    with pytest.raises(InputError, match="imbalance ≥ 1, got 'rows' and 0"):
        long_tail_mnist(data=tmp_path, imbalance=0, cells="rows")


def test_mixed_text_has_four_sources_of_which_one_is_clean(tmp_path: Path) -> None:
    text = "".join(chr(97 + (i * i) % 23) for i in range(65 * 520))
    (tmp_path / "a.txt").write_text(text)
    workload = mixed_text(data=tmp_path, width=16, clean=20, others=30)
    rows = workload.train_loader.dataset.dataset.tensors[0]  # type: ignore[attr-defined]
    assert len(rows) == 20 + 3 * 30
    characters = sorted(set(text))
    whole = {text[i : i + 65] for i in range(0, len(text), 65)}
    read = ["".join(characters[c] for c in row) for row in rows.tolist()]
    assert set(read[:20]) <= whole and {piece[::-1] for piece in read[50:80]} <= whole
    assert {"".join(sorted(p)) for p in read[80:]} <= {"".join(sorted(p)) for p in whole}
    assert workload.data_weights is not None
    assert workload.data_weights.cells({"index": torch.tensor([0, 20, 50, 109])}).tolist() == [
        *range(4)
    ]
    found = weighed_run(workload).data_weights
    assert found is not None and found.course is not None and found.names is not None
    with pytest.raises(InputError, match="fewer than the"):
        mixed_text(data=tmp_path)


def test_auxiliary_terms_help_harm_and_do_neither() -> None:
    torch.manual_seed(0)
    workload = auxiliary()
    assert workload.val_loader is not None
    batch, held_out = next(iter(workload.train_loader)), next(iter(workload.val_loader))
    terms = workload.loss_fn(workload.model, batch)
    assert set(terms) == {"target", "related", "misleading", "idle"}
    assert float(workload.loss_fn(workload.model, held_out)["misleading"]) == 0
    weights = weighed_run(workload, 60).data_weights
    assert weights is not None and weights.names is not None
    by_name = dict(zip(weights.names, weights.values.tolist(), strict=True))
    assert by_name["misleading"] < 0.7 * by_name["target"]
    with pytest.raises(InputError, match="takes no data"):
        auxiliary(data=Path("x"))
