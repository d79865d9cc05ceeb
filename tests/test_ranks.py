"""tests/ranks.py itself: whatever breaks in one rank is said, and nothing is started a second time."""

import os
import time

import pytest

from tests.ranks import on_ranks


def in_rank_1(code, starts):
    (starts / f"{time.monotonic_ns()}").touch()
    if os.environ["RANK"] == "1":
        exec(code)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('broken here')", ["rank 1 ended with 1:", "ValueError: broken here"]),
        ("os.kill(os.getpid(), 11)", ["rank 1 ended with SIGSEGV:", "in in_rank_1"]),
        ("time.sleep(100)", ["rank 1 ended with 1:", "Timeout", "in in_rank_1"]),
    ],
)
def test_what_breaks_in_one_rank_is_said(tmp_path, code, words):
    with pytest.raises(AssertionError) as stop:
        on_ranks(2, in_rank_1, code, tmp_path, limit=2)
    assert all(word in str(stop.value) for word in ["rank 0 ended with 0:", *words]), stop.value
    assert len(list(tmp_path.iterdir())) == 2
