"""What a run takes over from the one that it starts from (--init) or goes on with (--resume), and what must stay."""

from pathlib import Path

from training.files import UserError, read_json

SIZE, LEVELS = {"frames", "height", "width"}, {"student_sigmas", "shift", "guidance_scale", "frame_block"}


def flag(name):
    """A field of Args as the command line has it."""
    return "--" + name.replace("_", "-")


def handed_on(before, flags):
    """Names of the flags of a run, a dict, that stand in a run with `flags` that starts from it: its size, and where
    both have a few-step student in one phase also noise levels, guidance and frame block.
    """
    few_steps = all("student_sigmas" in each and "phase_ends" not in each for each in (before, flags))
    return sorted((SIZE | LEVELS if few_steps else SIZE) & before.keys() & flags.keys())


def flags_of(path):
    """The flags of a run or checkpoint folder; {} of anything else."""
    return read_json(path / "args.json") if (path / "args.json").is_file() else {}


def check_start(init, flags):
    """Lines for a run with `flags` that starts from that one, or from a file; UserError if it cannot."""
    before = flags_of(init)
    if before.get("frame_block") and not flags.get("frame_block"):
        how = f"with --frame-block {before['frame_block']}, in dmd2.py, dfd.py or codmd.py"
        raise UserError(f"--init: the student of {init} is causal, and goes on {how}")
    names = handed_on(before, flags)
    own = "".join(f" {flag(name)} {flags[name]}" for name in names)
    yield f"starting from {init}, with its{own}" if own else f"starting from {init}"
    for name in sorted({"teacher", "student_sigmas", *names} & before.keys() & flags.keys()):
        if before[name] != flags[name]:
            yield f"warning: {init} was trained with other {flag(name)}: {before[name]}"


def check_resumed(run, step, flags):
    """Lines for a run with `flags` that goes on in that folder after so many steps; UserError if it cannot."""
    before = read_json(run / "args.json")
    if before["script"] != flags["script"]:
        raise UserError(f"--resume: {run} is no run of {flags['script']}.py; to start from its weights, --init it")
    if step > flags["steps"]:
        raise UserError(f"--steps {flags['steps']} is over: {run} has {step} steps")
    fixed = ["student", "lora_rank", "fake_lora_rank", "frame_block"]  # what networks there are
    fixed += [name for name in ("ema_decay", "gan_weight") if not before.get(name)]
    fixed += [] if flags.get("ema_decay") else ["ema_decay"]
    fixed += [] if Path(before["teacher"]).name == Path(flags["teacher"]).name else ["teacher"]  # it may have moved
    fixed += ["steps", "phase_ends"] if "phase_ends" in before else []  # they say which expert is trained when
    for name in fixed:
        if name in before and flags[name] != before[name]:
            raise UserError(f"{flag(name)} {flags[name]}: {run} has {before[name]}, and cannot go on with another")
    if step == flags["steps"]:
        yield f"{run} is finished: to go on, give more --steps than {step}"
