"""experiments/curves.py on two-step runs of experiments/evidence_runs.py: what is drawn, and that pages show it."""

import pytest
from PIL import Image

from experiments import curves, evidence_runs


@pytest.mark.slow
def test_draws_what_was_logged(tmp_path, monkeypatch, capsys):
    flags = "--gan-weight 0 --steps 2 --batch-size 2 --student-every 1"
    runs = {"dmd2": ("", f"dmd2.py {flags}"), "no_normaliser": ("", f"experiments/variant.py no_normaliser {flags}")}
    monkeypatch.setattr(evidence_runs, "RUNS", runs)
    previews = "--preview-every 1 --preview-prompts 2 --preview-seeds 2 --teacher-steps 2"
    monkeypatch.setattr(evidence_runs, "EVERY", previews)
    monkeypatch.setattr(curves, "RUNS", {"dmd2": None, "no_normaliser": ("no normaliser", "dmd2")})
    with pytest.raises(SystemExit, match="dmd2 is not trained"):
        curves.main(tmp_path / "runs", tmp_path)
    for name, seed in (("dmd2", 0), ("dmd2", 1), ("no_normaliser", 0)):
        evidence_runs.train(tmp_path / "runs", name, seed)
    capsys.readouterr()
    curves.main(tmp_path / "runs", tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    for name in runs:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.getcolors(1 << 20)) > 50


@pytest.mark.parametrize("name", curves.RUNS)
def test_every_run_has_its_page(name):
    assert name in evidence_runs.RUNS and (curves.ROOT / "docs" / "curves" / f"{name}.png").is_file()
    assert f"(curves/{name}.png)" in (curves.ROOT / "docs" / "curves.md").read_text()
