"""experiments/curves.py on two-step runs: what is trained once, what is drawn, and what a missing run says."""

import pytest
from PIL import Image

from experiments import curves
from experiments.curves import Args

SHORT = "--steps 2 --batch-size 2 --gan-weight 0 --ema-decay 0 --preview-every 1 --student-every 1"


def test_trains_what_is_missing_and_draws_what_was_logged(tmp_path, monkeypatch, capsys, fails):
    healthy = {"dmd2": (f"dmd2.py {SHORT}", 2, None)}
    broken = {"no_normaliser": ((f"experiments/no_normaliser.py {SHORT}", 1, "dmd2"), "no normaliser", "dmd2")}
    monkeypatch.setattr(curves, "HEALTHY", healthy)
    monkeypatch.setattr(curves, "BROKEN", broken)
    monkeypatch.setattr(curves, "RUNS", {**healthy, "no_normaliser": broken["no_normaliser"][0]})
    monkeypatch.setattr(curves, "PREVIEW", "--preview-prompts 2 --preview-seeds 2 --teacher-steps 2")
    paths = {"runs_dir": tmp_path / "runs", "out": tmp_path / "out"}
    plot = Args("plot", only=("dmd2", "no_normaliser"), **paths)
    fails(lambda: curves.main(plot), "dmd2 is not trained: python experiments/curves.py train --only dmd2")
    curves.main(Args("train", only=("no_normaliser",), **paths))
    assert capsys.readouterr().out.splitlines() == [
        "dmd2, seed 0: done", "dmd2, seed 1: done", "no_normaliser, seed 0: done",
    ]  # fmt: skip
    curves.main(Args("train", only=("dmd2", "no_normaliser"), **paths))
    assert capsys.readouterr().out == ""
    curves.main(plot)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[2].startswith("| dmd2 | ") and rows[3].count("|") == rows[0].count("|")
    assert all("nan" not in row for row in rows)
    for name in ("dmd2", "no_normaliser"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.getcolors(1 << 20)) > 50
    # the two trained otherwise, from one start
    student = [curves.logged(curves.finished(plot, name, 0))["loss/student"][1] for name in ("dmd2", "no_normaliser")]
    assert abs(student[0][0] - student[1][0]) > 1e-3
    fails(lambda: curves.main(Args("plot", only=("dmd3",), **paths)), "unknown run 'dmd3'")


@pytest.mark.parametrize("name", curves.RUNS)
def test_every_run_has_its_page(name):
    page = (curves.ROOT / "docs" / "curves.md").read_text()
    assert f"(curves/{name}.png)" in page and (curves.ROOT / "docs" / "curves" / f"{name}.png").is_file()
