"""SIGINT (Ctrl-C) and SIGTERM during training. The first signal is noted, and `check` raises it at
the end of the step. After GRACE seconds, or at a second signal, it is raised at once. Python
swallows what is raised in some callbacks (`__del__`, after a fork), so that every `check` raises it
again until it has left the run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

GRACE = 2.0
"""Seconds for the current step; a stopped process should be gone after five."""

STATUS: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit statuses by signal, as in shells."""

Item = TypeVar("Item")


class Terminated(KeyboardInterrupt, SystemExit):
    """SIGTERM, raised where SIGINT raises KeyboardInterrupt; uncaught, the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(STATUS[signal.SIGTERM])
        self.code = STATUS[signal.SIGTERM]


@dataclass
class _State:
    """waiting: runs inside `at_steps`. received: the first signal, for the exit status; asked: one
    that has not been raised to the end yet. at_once: signals left alone."""

    waiting: int = 0
    received: int | None = None
    asked: int | None = None
    timer: threading.Timer | None = None
    at_once: set[int] = field(default_factory=set)


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Handles signals inside, where nobody else does; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    taken = [n for n, h in usual.items() if signal.getsignal(n) is h and n not in _state.at_once]
    for number in taken:
        signal.signal(number, _on_signal)
    if taken:
        _state.received = _state.asked = None
    try:
        yield
    except KeyboardInterrupt:
        _state.asked = None  # it has been handled
        raise
    finally:
        for number in taken:
            signal.signal(number, usual[number])


def _on_signal(number: int, frame: FrameType | None) -> None:
    first = _state.asked is None
    _state.asked, _state.received = number, _state.received or number
    if _state.waiting and first:
        _state.timer = threading.Timer(GRACE, _send_again, (number,))
        _state.timer.daemon = True
        _state.timer.start()
        return
    # A loader with an unresponsive worker is left after half a second; torch waits for five.
    loading: Any = sys.modules.get("torch.utils.data._utils")
    if loading is not None and hasattr(loading, "MP_STATUS_CHECK_INTERVAL"):
        loading.MP_STATUS_CHECK_INTERVAL = 0.5
    _raise(number)


@contextmanager
def at_steps() -> Iterator[None]:
    """Inside, signals wait for `check`; an error that they cause is not reported."""
    with handled():
        _state.waiting += 1
        try:
            yield
        except Exception:
            # A terminal's Ctrl-C also ends the loader's workers, which is an error.
            check()
            raise
        finally:
            _state.waiting -= 1
            _stop_timer()
        check()


def check() -> None:
    """Raises KeyboardInterrupt or Terminated if a signal came."""
    if _state.asked is not None:
        _raise(_state.asked)


def _raise(number: int) -> None:
    _stop_timer()  # and no signal is sent while the run is left
    raise Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def asked() -> bool:
    """Whether a signal is waiting."""
    return _state.asked is not None


def until_asked(items: Iterable[Item]) -> Iterator[Item]:
    """The items, at least one, until a signal comes."""
    check()
    for item in items:
        yield item
        if asked():
            return


def received() -> int | None:
    return _state.received


def at_once(number: int) -> None:
    """From now on this signal ends the process immediately."""
    _state.at_once.add(number)
    signal.signal(number, signal.SIG_DFL)


def _send_again(number: int) -> None:
    if _state.asked == number and hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)


def _stop_timer() -> None:
    timer, _state.timer = _state.timer, None
    if timer is not None:
        timer.cancel()


def _in_child() -> None:
    """Restores the signals in a forked process, such as a loader's worker, so that they end it."""
    for number in STATUS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
