"""tests/ranks.py itself: what breaks in one rank is said, and a rank that a signal killed is started once more."""

import os
import signal

import pytest

from tests.ranks import on_ranks


def broken_in_one(path):
    if os.environ["RANK"] == "1":
        raise ValueError(f"broken in {path}")


def killed_once(path):
    """A signal ends rank 1 the first time; the folder that the first start wrote is gone in the second."""
    if os.environ["RANK"] == "1" and not path.with_name("seen").exists():
        path.with_name("seen").touch()
        os.kill(os.getpid(), signal.SIGSEGV)


def test_what_breaks_in_one_rank_is_said(tmp_path):
    with pytest.raises(AssertionError, match="(?s)exit codes .0, 1..*rank 1:.*ValueError: broken in"):
        on_ranks(2, broken_in_one, tmp_path)


def test_a_killed_rank_is_started_once_more(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    on_ranks(2, killed_once, folder, folders=[folder])
    assert (tmp_path / "seen").exists() and not folder.exists()
    with pytest.raises(AssertionError, match="exit codes"):
        on_ranks(2, os.abort)
