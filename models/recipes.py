"""What other teachers change of the scripts' flags (made for Wan2.1-1.3B): {teacher: {script: {flag: value}}}.

A teacher without a row for a script takes that of the teacher that presets.py calls `like` it. Frames, height and width
are the size that the teacher is made for. What no source is named for is ours, and untried on that teacher.
"""

from models.presets import PRESETS, most_like

BLOCKS_14B = {"discriminator_blocks": (21, 30, 39)}  # FastGen on Wan 14B
CODMD_14B = BLOCKS_14B | {  # CoDMD's 14B config, on 32 GPUs
    "grad_accum": 4,
    "lr": 4e-6,
    "fake_score_lr": 8e-7,
    "shift": 5.0,
    "student_sigmas": (1.0, 0.937, 0.833, 0.624),
}
ONE_STEP_14B = {"grad_accum": 4, "lr": 4e-6, "fake_score_lr": 4e-6, "shift": 5.0}  # CoDMD's, both networks alike
TINY = {
    "batch_size": 16,
    "grad_accum": 1,
    "steps": 500,
    "lr": 1e-3,
    "fake_score_lr": 1e-3,
    "anneal_lr": True,
    "betas": (0.0, 0.999),
    "guidance_scale": 2.0,
    "shift": 3.0,
    "gradient_checkpointing": 0,
    "save_every": 250,
    "preview_every": 250,
    "preview_prompts": 12,
}
TINY_FEW_STEPS = TINY | {"student_sigmas": (1.0, 0.9, 0.75, 0.5), "discriminator_blocks": (1, 3, 5)}
TINY_ONE_STEP = TINY | {"pair_steps": 12, "regression_weight": 0.02}  # .25 blurs: docs/dmd.md

RECIPES = {
    "wan2.1-14b": {
        "dmd": ONE_STEP_14B,
        "dmd2": CODMD_14B,
        "dfd": BLOCKS_14B,  # the paper has no 14B: that of 1.3B
        "codmd": CODMD_14B | {"sample_relation": 1.0},  # relates 32 samples there, 8 here
        "phased_dmd": BLOCKS_14B,
        "ode_init": ONE_STEP_14B | {"student_sigmas": (1.0, 0.937, 0.833, 0.624)},
    },
    "wan2.2-a14b": {  # Phased DMD's: phase 1 is scored by the high-noise experts alone (clamped there, drawn so here)
        "phased_dmd": BLOCKS_14B | {"score_ends": (0.875, 0.0)},
    },
    "wan2.2-i2v-a14b": {
        "phased_dmd": BLOCKS_14B | {"score_ends": (0.9, 0.0)},
    },
    "cosmos2.5-2b": {
        # FastGen's CosmosPredict2/config_dmd2.py at 720p; its 480p version before had guidance 3. Otherwise there: the
        # fake score's loss in x0 space, a discriminator of weight 1 on the frozen teacher's features, an ODE sampler,
        # and noise levels drawn within .001 to .999 before the shift
        "dmd2": {
            "lr": 1e-5,
            "fake_score_lr": 1e-5,
            "ema_decay": 0.0,
            "guidance_scale": 4.0,
            "shift": 5.0,
            "score_sigmas": (0.001, 0.999),
            "student_sigmas": (0.999, 0.937, 0.833, 0.624),
            "student_input": "data",
            "gan_weight": 0.03,
            "discriminator_blocks": (13, 20, 27),
        },
        "dfd": {"steps": 300, "guidance_scale": 3.0, "discriminator_blocks": (13, 20, 27)},  # the paper's
    },
    "qwen-image": {
        "dmd2": {"discriminator_blocks": (30, 44, 59)},
        "dfd": {"discriminator_blocks": (30, 44, 59)},
        "phased_dmd": {  # the paper's
            "shift": 3.0,
            "student_sigmas": (1.0, 0.9, 0.75, 0.5),
            "phase_ends": (0.75, 0.0),
        },
    },
    "tiny": {  # tuned on it: tiny/README.md
        "dmd": TINY_ONE_STEP | {"steps": 2000, "shift": 1.0, "num_samples": 512},
        "dmd2": TINY_FEW_STEPS,
        "dfd": TINY_FEW_STEPS
        | {
            "steps": 50,
            "lr": 2e-4,
            "fake_score_lr": 2e-4,
            "anneal_lr": False,
            "score_sigmas": (0.02, 0.98),
            "save_every": 25,
            "preview_every": 25,
        },
        "codmd": TINY_FEW_STEPS,
        "phased_dmd": TINY_FEW_STEPS | {"phase_ends": (0.75, 0.0), "lora_rank": 0, "ema_decay": 0.0},
        "ode_init": TINY_ONE_STEP | {"steps": 1500, "student_sigmas": (1.0, 0.9, 0.75, 0.5), "frame_block": 1},
    },
}
BLOCKS = "discriminator_blocks"
RECIPES["tiny-small"] = {script: row | {BLOCKS: (0, 1, 2)} for script, row in RECIPES["tiny"].items() if BLOCKS in row}


def recipe(teacher, script, student=None):
    """What a teacher, a name or a folder, changes of a script's flags; the blocks to read are those of `student`."""
    name = most_like(teacher)
    size = dict(zip(("frames", "height", "width"), PRESETS[name].size))
    while name and script not in RECIPES.get(name, {}):
        name = PRESETS[name].like
    own = size | (RECIPES[name][script] if name else {})
    if student:
        own.pop(BLOCKS, None)
        own |= {key: value for key, value in recipe(student, script).items() if key == BLOCKS}
    return own
