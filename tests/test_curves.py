"""experiments/curves.py on two-step runs of experiments/evidence_runs.py: what is drawn, what a missing run says."""

import pytest
from PIL import Image

from experiments import curves, evidence_runs
from experiments.curves import Args

SHORT = "--steps 2 --batch-size 2 --gan-weight 0 --student-every 1"


def test_draws_what_was_logged(tmp_path, monkeypatch, capsys, fails):
    runs = {"dmd2": ("dmd2.py", SHORT, None), "no_normaliser": ("experiments/no_normaliser.py", SHORT, "dmd2")}
    monkeypatch.setattr(evidence_runs, "RUNS", runs)
    previews = "--preview-every 1 --preview-prompts 2 --preview-seeds 2 --teacher-steps 2"
    monkeypatch.setattr(evidence_runs, "PREVIEWS", previews)
    monkeypatch.setattr(curves, "SEEDS", (0, 1))
    args = Args(only=("dmd2", "no_normaliser"), runs_dir=tmp_path / "runs", out=tmp_path / "out")
    fails(lambda: curves.main(args), "dmd2 is not trained: python experiments/evidence_runs.py")
    for name, seed in (("dmd2", 0), ("dmd2", 1), ("no_normaliser", 0)):
        for times in (1, 0):  # what is trained is not trained again
            evidence_runs.train(args.runs_dir, name, seed)
            assert capsys.readouterr().out == f"{name}, seed {seed}: done\n" * times
    curves.main(args)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[2].startswith("| dmd2 | ") and rows[3].count("|") == rows[0].count("|")
    assert all("nan" not in row for row in rows)
    for name in ("dmd2", "no_normaliser"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.getcolors(1 << 20)) > 50
    # the two trained otherwise, from one start
    folders = [evidence_runs.finished(args.runs_dir, name, 0) for name in runs]
    student = [curves.logged(folder)["loss/student"][1] for folder in folders]
    assert abs(student[0][1] - student[1][1]) > 0.1
    fails(lambda: curves.main(Args(only=("dmd3",))), "unknown run 'dmd3'")


@pytest.mark.parametrize("name", [*curves.HEALTHY, *curves.BROKEN])
def test_every_run_has_its_page(name):
    page = (curves.ROOT / "docs" / "curves.md").read_text()
    assert name in evidence_runs.RUNS
    assert f"(curves/{name}.png)" in page and (curves.ROOT / "docs" / "curves" / f"{name}.png").is_file()
