"""Solve noise-video pairs of a teacher once, for the regression of dmd.py.

    torchrun --nproc_per_node=8 tools/make_pairs.py pairs/ --teacher wan2.1-1.3b --prompts prompts.txt
    torchrun --nproc_per_node=8 dmd.py --pairs pairs/ --teacher wan2.1-1.3b --prompts prompts.txt

A pair is the noise and what the guided teacher makes of it by deterministic Euler steps. The flags are dmd.py's; those
that matter are --num-pairs, --pair-steps, --guidance-scale, --shift, --batch-size (pairs solved at once), --seed and
the video's shape. Run it again after an interruption: it goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/make_pairs.py` finds the scripts

import common  # noqa: E402
import dmd  # noqa: E402


def main(out, args):
    if args.dry_run:
        raise common.Fatal("--dry-run counts training steps: use it with dmd.py")
    if Path(out).exists() and not Path(out).is_dir():
        raise common.Fatal(f"{out} is a file: the first argument is the folder for the pairs")
    common.check_ranges(vars(args))
    _, _, device = common.init_distributed()
    spec = common.Teacher(args.teacher, args.frames, args.height, args.width)
    cache = Path(args.runs_dir) / "cache"
    data = common.load_data(spec, args.prompts, args.data, cache, device, args.seed)
    key, note = dmd.pairs_key(args, spec, data), Path(out) / "key.txt"
    common.make_folder(out, hint="")
    said = [note.read_text() if note.is_file() else None]
    common.dist.broadcast_object_list(said)
    if said[0] not in (None, str(key)):
        raise common.Fatal(f"{out} holds pairs of other settings (teacher, prompts or flags): give another folder")
    if common.dist.get_rank() == 0:
        note.write_text(str(key))
    null_cond = common.encode_text(spec, [spec.negative_prompt], cache, device).cond_of([0])
    teacher = spec.load_network(trained=False, device=device)
    pairs = dmd.solve_pairs(args, spec, teacher, data, null_cond, device, Path(out))
    if common.dist.get_rank() == 0:
        print(f"{len(pairs)} pairs in {out}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stdout if {"-h", "--help"} & set(sys.argv) else sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    folder = sys.argv.pop(1)
    main(folder, common.parse_args(dmd.Args, dmd.RECIPES))
