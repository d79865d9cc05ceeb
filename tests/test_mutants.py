"""The list of tests/mutants.py is of today's code, and its tests notice."""

import pytest

from tests import mutants


def test_every_passage_is_in_its_file_once():
    for file, _, *change in mutants.JOBS:
        mutants.mutated(file, *change)


@pytest.mark.slow
def test_ten_of_them_die():
    assert mutants.run(mutants.todays(10)) == 0
