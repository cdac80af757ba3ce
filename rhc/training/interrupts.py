"""How a run is stopped from outside: SIGINT (Ctrl-C) and SIGTERM, at the end of a step.

The first signal is remembered, and `check`, which the Runner calls between steps, raises what it
means. Where no step ends within GRACE seconds (a long reverse pass, a loader that waits), and at a
second signal, it is raised in the middle: also that loses nothing that was saved. Python swallows
what is raised inside some callbacks (`__del__`, after a fork), so that a signal counts as answered
only when its exception has left the run: until then every `check` raises it again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

GRACE = 2.0
"""Seconds for the step that is being taken; a stopped process is to be gone after five."""

STATUS: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""What shells say of a process that a signal ended."""

Item = TypeVar("Item")


class Terminated(KeyboardInterrupt, SystemExit):
    """SIGTERM, raised where SIGINT raises KeyboardInterrupt: uncaught, the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(STATUS[signal.SIGTERM])
        self.code = STATUS[signal.SIGTERM]


@dataclass
class _State:
    """owner: of the handlers. waiting: how many runs wait for the end of a step. received: first
    signal of all, which the exit status tells; asked: one that nothing has ended by yet."""

    owner: int = 0
    waiting: int = 0
    received: int | None = None
    asked: int | None = None
    timer: threading.Timer | None = None


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Signals are ours inside, where they are nobody else's; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    usual = {s: h for s, h in usual.items() if s not in _at_once}
    before = {s: h for s, h in usual.items() if signal.getsignal(s) is h}
    _state.owner = os.getpid()
    for number in before:
        signal.signal(number, _received)
    if before:
        _state.received = _state.asked = None
    try:
        yield
    except KeyboardInterrupt:
        _state.asked = None  # it has been acted on
        raise
    finally:
        if os.getpid() == _state.owner:
            for number, handler in before.items():
                signal.signal(number, handler)


_at_once: set[int] = set()


def at_once(number: int) -> None:
    """From now on this signal ends the process at once, whatever it is waiting for."""
    _at_once.add(number)
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def at_steps() -> Iterator[None]:
    """A signal inside waits for `check`; an error that it causes on the way is not told."""
    with handled():
        _state.waiting += 1
        try:
            yield
        except Exception:
            # A terminal's Ctrl-C goes to the loader's workers too, and their death is an error.
            check()
            raise
        finally:
            _state.waiting -= 1
            _insist_no_more()
        check()


def check() -> None:
    """Raises KeyboardInterrupt or Terminated if a signal came."""
    if _state.asked is not None:
        _insist_no_more()
        raise _meaning(_state.asked)


def asked() -> bool:
    """Whether a signal came that nothing has ended by yet."""
    return _state.asked is not None


def until_asked(items: Iterable[Item]) -> Iterator[Item]:
    """The items, ending early, after one at least, once a signal has come."""
    check()
    for item in items:
        yield item
        if asked():
            return


def received() -> int | None:
    """The number of the signal that came first since the handlers were put in place."""
    return _state.received


def _meaning(number: int) -> BaseException:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _received(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.owner:
        # A forked worker of a loader, which must die of it.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    first, _state.asked = _state.asked is None, number
    _state.received = _state.received or number
    if _state.waiting and first:
        _state.timer = threading.Timer(GRACE, _insist, (number,))
        _state.timer.daemon = True
        _state.timer.start()
        return
    _insist_no_more()  # nor while the run is being left
    _hurry_loaders()
    raise _meaning(number)


def _hurry_loaders() -> None:
    """A loader whose worker does not answer is left after half a second; torch waits for five."""
    loading: Any = sys.modules.get("torch.utils.data._utils")
    if loading is not None and hasattr(loading, "MP_STATUS_CHECK_INTERVAL"):
        loading.MP_STATUS_CHECK_INTERVAL = 0.5


def _insist_no_more() -> None:
    timer, _state.timer = _state.timer, None
    if timer is not None:
        timer.cancel()


def _insist(number: int) -> None:
    if _state.asked == number and hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)


def _in_child() -> None:
    if _state.owner:
        for number in STATUS:
            if signal.getsignal(number) is _received:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
