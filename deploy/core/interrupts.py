"""Ctrl-C and SIGTERM that are not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a few places that ends nothing: in callbacks
around a fork, in destructors ("Exception ignored in …"), in C code that takes any error for its own. So the request is
remembered: what was lost is sent again, long loops ask at safe points, and an error that only came of it counts as it.

    with listening():
        for batch in batches:
            check()
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN_S = 0.05  # until a request that Python ignored is sent again


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever cleans up after Ctrl-C does it now."""


_requested: int | None = None


def check() -> None:
    """Raise KeyboardInterrupt where the process was asked to end, and goes on nevertheless."""
    if _requested is not None:
        raise _of(_requested)


@contextmanager
def listening() -> Iterator[None]:
    """Take SIGINT and SIGTERM for requests to end, and forget them at the end. In a thread that is not the main one,
    and for a signal that the process was started to ignore, nothing changes."""
    global _requested
    _requested, owner = None, os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        global _requested
        if os.getpid() != owner:  # a forked worker: Ctrl-C reaches it, too, and its parent ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        _requested = number
        raise _of(number)

    def ignored(lost: Any) -> None:
        if _requested is None or not isinstance(lost.exc_value, KeyboardInterrupt) or os.getpid() != owner:
            hook(lost)
            return
        again = threading.Timer(AGAIN_S, os.kill, (owner, _requested))
        again.daemon = True
        again.start()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, end)
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _requested is not None:  # a worker that is gone, an import that broke off: it came of the request
            raise _of(_requested) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _requested = None


def _of(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
