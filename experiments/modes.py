"""Count the looks and directions in samples of runs on the teacher of tiny/modes, at each of their checkpoints.

    python dmd2.py --teacher tiny/modes/teacher --prompts tiny/modes/open.txt …      # see tiny/modes/README.md
    python experiments/modes.py runs/dmd2__teacher__0__…                             # a Markdown table, and sheet.png

Every row has --seeds samples of each caption in tiny/modes/open.txt, those that leave a look open. Figures are those of
tiny/modes/measures.py, over all of them.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from annotated_types import Ge

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python experiments/modes.py` finds the scripts

from harness.flags import check_flags, one_line_errors  # noqa: E402

import common  # noqa: E402
import dmd2  # noqa: E402
from harness.files import Fatal, make_folder, read_prompts  # noqa: E402
from harness.finished import load_run, students_of  # noqa: E402
from harness.media import contact_sheet  # noqa: E402
from tiny.modes import measures, world  # noqa: E402

FIGURES = {
    "right": "right, %", "looks": "looks", "looks_present": "looks present, %", "motions": "directions",
    "motions_present": "directions present, %", "brightness_mean": "brightness", "saturation_mean": "saturation",
}  # fmt: skip


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders on tiny/modes/teacher."""
    seeds: Annotated[int, Ge(1)] = 48
    """Samples of each caption."""
    teacher_steps: Annotated[int, Ge(1)] = 25
    """Euler steps of the teacher, at the first run's guidance and shift."""
    out: Path = Path("runs/modes")
    """Folder for table.md and sheet.png."""


@torch.no_grad()
def main(args):
    check_flags(args)
    if not args.runs:
        raise Fatal("name at least one run folder")
    checkpoints = [path for run in args.runs for path in sorted(Path(run).glob("checkpoints/step_*[0-9]"))]
    loaded = [load_run(path) for path in checkpoints or args.runs]
    make_folder(args.out, hint="; see --out")
    device, first = common.init_distributed(), loaded[0][1]
    prompts = read_prompts(ROOT / "tiny" / "modes" / "open.txt")
    model = common.Model(first.teacher, world.FRAMES, world.SIZE, world.SIZE)
    if model.folder.resolve() != (ROOT / "tiny" / "modes" / "teacher").resolve():
        raise Fatal(f"{args.runs[0]} has another teacher, {first.teacher}: only tiny/modes/teacher has these modes")
    shape, vae = model.latent_shape, model.load_vae(device)
    texts, null = (common.encode_text(model, words, args.out / "cache", device) for words in (prompts, [""]))
    captions, lines, shown = [prompt for prompt in prompts for _ in range(args.seeds)], [], []

    def add(name, videos):
        figures = measures.summary(videos, captions)
        lines.append(f"| {name} | {' | '.join(f'{figures[key]:.3g}' for key in FIGURES)} |")
        shown.extend((f"{name}: {prompts[i]}", videos[i * args.seeds :][:4]) for i in range(3))
        print(lines[-1], flush=True)

    def sample(sampler):
        videos = []
        for numbers in torch.arange(len(captions)).split(48):
            rng = common.Draws(0, "modes", numbers.tolist(), device)
            latents = sampler(rng, texts.cond_of([n // args.seeds for n in numbers.tolist()]), shape=shape)
            videos.append(common.decode(vae, latents).cpu())
        return torch.cat(videos)

    def euler(rng, cond, shape):
        settings = (null.cond_of([0]), first.guidance_scale, first.shift, args.teacher_steps)
        return dmd2.solve_ode(teacher, rng.normal(shape), cond, *settings)

    add("data", world.batch(1, range(10**9, 10**9 + len(captions)), captions)[0])
    teacher = model.load_network("teacher", device)
    add(f"teacher, {args.teacher_steps} steps", sample(euler))
    for script, run_args, checkpoint in loaded:
        students = students_of(model, device, script, run_args, checkpoint, raw=False)
        step = int(checkpoint.name.removeprefix("step_"))
        add(f"{script.__name__}, after {step} steps", sample(partial(script.sample_student, students, args=run_args)))
    head = [f"| | {' | '.join(FIGURES.values())} |", f"|---|{'---:|' * len(FIGURES)}"]
    (args.out / "table.md").write_text("\n".join([*head, *lines]) + "\n")
    contact_sheet(args.out / "sheet.png", shown)
    print(f"{args.out / 'table.md'}; sheet.png beside it")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
