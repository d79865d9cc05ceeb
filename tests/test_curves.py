"""experiments/curves.py on two-step runs of experiments/evidence_runs.py: what is drawn, and that pages show it."""

import pytest

from experiments import curves, evidence_runs


@pytest.mark.parametrize("name", curves.RUNS)
def test_every_run_has_its_page(name):
    assert name in evidence_runs.RUNS and (curves.ROOT / "docs" / "curves" / f"{name}.png").is_file()
    assert f"(curves/{name}.png)" in (curves.ROOT / "docs" / "curves.md").read_text()
