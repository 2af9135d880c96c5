"""Which host of a training is slow."""

from __future__ import annotations

from compress.training.pace import SLOW, slowest

HOSTS = ["here", "there", "elsewhere"]


def test_as_fast_as_the_others() -> None:
    assert slowest([[0.1, 0.9], [0.2, 0.9], [0.0, 0.8]], HOSTS) is None
    assert slowest([[0.0, 1.0], [0.0, SLOW]], HOSTS) is None  # not more than that
    assert slowest([[0.0, 0.01], [0.0, 0.09]], HOSTS, 0.1) is None  # of a step of a second, nobody minds
    assert slowest([[0.0, 0.01], [0.0, 0.12]], HOSTS, 0.1) is not None


def test_the_slow_one_and_its_reason() -> None:
    found = slowest([[0.1, 0.9], [2.5, 0.5], [0.1, 0.7]], HOSTS)
    assert found == (
        "there (process 1)",
        "slow: there (process 1) takes 3 s a step before the others can go on, they 0.9 s; 83% of it waiting for its "
        "images",
    )
    found = slowest([[0.1, 2.9], [0.1, 0.4]], HOSTS)
    assert found is not None and found[0] == "here (process 0)" and found[1].endswith("97% of it in the forward pass")
