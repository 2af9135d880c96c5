"""Requests to end that arrive where Python would lose them. Each in a process of its own, for its signals."""

from __future__ import annotations

import os
import subprocess
import sys

BEGIN = """
import os, signal, time
from deploy.core import interrupts

def wait():
    while True:
        time.sleep(0.01)
"""


def run(code: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


def test_what_is_lost_around_a_fork_is_heard_again() -> None:
    assert run("""
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    with interrupts.listening():
        if os.fork() == 0:
            os._exit(0)
        print("forked")
        wait()
except KeyboardInterrupt:
    print("ended")
""") == (0, "forked\nended\n", "")


def test_what_c_code_takes_for_its_own_error_is_heard_at_a_safe_point() -> None:
    assert run("""
try:
    with interrupts.listening():
        interrupts.check()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            print("lost")
        interrupts.check()
except interrupts.Terminated:
    print("ended")
interrupts.check()
""") == (0, "lost\nended\n", "")


def test_an_error_that_came_of_it_counts_as_it_and_another_does_not() -> None:
    assert run("""
for asked in (True, False):
    try:
        with interrupts.listening():
            try:
                if asked:
                    os.kill(os.getpid(), signal.SIGINT)
            finally:
                raise ImportError("broken off")
    except (KeyboardInterrupt, ImportError) as error:
        print(type(error).__name__)
""") == (0, "KeyboardInterrupt\nImportError\n", "")


def test_a_forked_worker_leaves_control_c_to_its_parent_and_can_be_terminated() -> None:
    assert run("""
with interrupts.listening():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGINT)
        print("goes on", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        wait()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""") == (0, "goes on\n-15\nTrue\n", "")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    assert run("""
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interrupts.listening():
    os.kill(os.getpid(), signal.SIGINT)
print("goes on")
""") == (0, "goes on\n", "")
