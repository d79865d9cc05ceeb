"""Break one line of the code at a time and see that a test fails. Run by hand, not in CI: about half an hour on two cores.

    python tests/mutants.py                 # all of them, two at a time
    python tests/mutants.py dmd2 codmd      # those of some files
    python tests/mutants.py --list

Each mutant is a copy of the repository with one passage replaced; the tests named beside its file run on the copy until
one fails. "lives" means that none did, which is a defect of the tests. A passage that is no longer there is an error.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# file: (tests that must notice, [(passage, what replaces it, which of its occurrences)])
MAINS = "tests/test_mains.py -k"
SIGMA = "sigma = sample_sigma(rng, args.shift, *args.score_sigmas)"
FAKE = "x0_fake = predict_x0(fake_score, x_t, sigma, cond)"
REAL = "x0_teacher = guided_x0(teacher, x_t, sigma, cond, null_cond, args.guidance_scale)"
BACKWARD = "(loss / args.grad_accum).backward()"
STREAM = 'data.micro_batches("fake_score", step'
SHARED = [  # lines that dmd.py and its descendants share
    ("dmd_gradient(x0, x0_teacher, x0_fake)\n                loss", "dmd_gradient(x0, x0_fake, x0_teacher)\n                loss", 1),
    (FAKE, FAKE.replace("fake_score", "teacher"), 1),
    (REAL, REAL.replace("teacher", "fake_score"), 1),
    (REAL, REAL.replace("args.guidance_scale", "1.0"), 1),
    (REAL, REAL.replace("x_t", "add_noise(x0, rng.normal(shape), sigma)"), 1),
    (", x0, noise)\n            log", ", x0, rng.normal(shape))\n            log", 1),
    (STREAM, STREAM.replace('"fake_score"', '"student"'), 1),
    (BACKWARD, "loss.backward()", 1),
    (BACKWARD, "loss.backward()", 2),
    ("fake_score_optimizer.step()\n        fake_score_optimizer.zero_grad()", "fake_score_optimizer.step()", 1),
    ("student_optimizer.zero_grad()\n", "pass\n", 1),
    ("common.ema_update(ema, student, args.ema_decay)\n\n", "pass\n        common.ema_update(ema, student, args.ema_decay)\n\n", 1),
    ("students=[ema]", "students=[student]", 1),
    ("sample_student([ema], ", "sample_student([student], ", 1),
    ('"betas": args.betas, ', "", 1),
    ('"weight_decay": args.weight_decay, ', "", 1),
    ("common.clip_grad_norm(student, args.max_grad_norm)", "common.clip_grad_norm(student, 1e9)", 1),
    ("common.clip_grad_norm(fake_score, args.max_grad_norm)", "common.clip_grad_norm(fake_score, 1e9)", 1),
    ("step % args.student_every == 0", "step % args.student_every == 1", 1),
    ("args.lr * lr_scale", "args.lr", 1),
    ("args.fake_score_lr * lr_scale", "args.fake_score_lr", 1),
    ("args.fake_score_lr * lr_scale", "args.lr * lr_scale", 1),
    ('data.micro_batches("student", step,', 'data.micro_batches("student", step + 1,', 1),
]  # fmt: skip
TIMES = [
    (SIGMA, SIGMA.replace(own, other), which)
    for own, other in (("args.shift", "1.0"), (", *args.score_sigmas", "")) for which in (1, 2)
]  # fmt: skip
GAN = [
    ("discriminator_loss(logits_fake, fake_score.heads(features))", "discriminator_loss(fake_score.heads(features), logits_fake)", 1),
    ("add_noise(x0_data(), noise, sigma)", "add_noise(data.latents([n + 1 for n in rng.numbers]), noise, sigma)", 1),
    ("add_noise(x0_data(), noise, sigma)", "add_noise(x0_data(), rng.normal(shape), sigma)", 1),
    ("loss + args.discriminator_weight * gan_loss", "loss + gan_loss", 1),
    ("loss + args.gan_weight * gan_loss", "loss + 10 * args.gan_weight * gan_loss", 1),
    ("            fake_score_optimizer.zero_grad()  # of what the student's GAN loss left in it\n", "", 1),
    ("fake_score(add_noise(x0, noise, sigma), sigma, cond, read)", "fake_score(add_noise(x0, noise, 1 - sigma), sigma, cond, read)", 1),
    ("_, features = fake_score(add_noise(x0_data()", "_, _ = fake_score(add_noise(x0_data()", 1),
    ("fake_score(add_noise(x0, noise, sigma)", "fake_score(x_t", 1),
]  # fmt: skip
EXITS = [
    ("1 + int(shared.uniform(\"exit\") * len(args.student_sigmas))", "int(shared.uniform(\"exit\") * len(args.student_sigmas)) or 1", 1),
    ("x0_data() if from_data else None", "None", 1),
    ("x0_data() if from_data else None", "None", 2),
    ("x0 = rollout(student, rng", "x0 = rollout(ema, rng", 2),
]  # fmt: skip
COMMON = (
    "tests/test_common.py tests/test_dmd2.py tests/test_dfd.py tests/test_runs.py tests/test_codmd.py "
    "tests/test_phased_dmd.py tests/test_mains.py"
)
COIN = 'x_t = add_noise(x0_data() if shared.uniform("coin") < args.data_prob else x0, noise, sigma)'
RELATION = "relation_loss(x0, x0_teacher, x0_fake, *weights)"
MUTANTS = {
    "dmd.py": (f"{MAINS} test_dmd and not dmd2", [*(m for m in SHARED), *TIMES,
        ("x0 = rollout(student, rng", "x0 = rollout(ema, rng", 2),
        ("(args.regression_weight * loss", "(loss", 1),
        ("torch.ones_like(sigma), pairs", "sigma, pairs", 1),
        ('pairs.latents(rng.numbers, "noise"), pairs.latents(rng.numbers)', 'pairs.latents(rng.numbers), pairs.latents(rng.numbers, "noise")', 1),
        ("pairs.cond(rng.numbers)", "cond", 1),
        ("F.mse_loss(x0, x0_pair)", "F.l1_loss(x0, x0_pair)", 1),
    ]),
    "dmd2.py": (f"{MAINS} test_dmd2", [*SHARED, *TIMES, *GAN, *EXITS,
        ("lambda rng, cond: solve(rng", "lambda rng, cond: sample_student([ema], rng, cond, shape, args) + 0 * solve(rng", 1),
        ("return F.softplus(-logits_fake).mean()", "return F.softplus(logits_fake).mean()", 1),
        ("add_noise(predict_x0(student, x_t, sigma, cond), rng.normal(x_t.shape[1:]), sigma_next)", "add_noise(predict_x0(student, x_t, sigma, cond), x_t, sigma_next)", 1),
        ("zip(self.blocks, features, strict=True)", "zip(self.blocks, features[::-1], strict=True)", 1),
        ("read = args.discriminator_blocks if", "read = args.discriminator_blocks[::-1] if", 1),
    ]),
    "dfd.py": (f"{MAINS} test_dfd", [
        (COIN, COIN.replace("noise, sigma", "rng.normal(shape), sigma"), 1),
        (COIN, COIN.replace("noise, sigma", "noise, 1 - sigma"), 1),
        (COIN, COIN.replace('shared.uniform("coin") < args.data_prob', "args.data_prob"), 1),
        (COIN, COIN.replace("shared.uniform", "common.SharedRNG(args.seed, 7 * step + micro).uniform"), 1),
        (COIN, COIN.replace('"coin"', '"exit"'), 1),
        (COIN, COIN.replace("x0_data() if", "x0 if").replace("else x0", "else x0_data()"), 1),
        (FAKE + "\n                    " + COIN, COIN + "  #\n                    " + FAKE, 1),
        ("grad = dmd_gradient(x0, x0_teacher, x0_fake)\n                loss", 'grad = dmd_gradient(x0, x0_teacher, x0_fake) * (-1) ** (shared.uniform("coin") < args.data_prob)\n                loss', 1),
        (REAL, REAL + "\n                    x0_own = guided_x0(teacher, add_noise(x0, noise, sigma), sigma, cond, null_cond, args.guidance_scale)\n"
               "                    x0_teacher = x0 - (x0 - x0_teacher) * ((x0 - x0_own).abs().mean((1, 2, 3, 4), True) / (x0 - x0_teacher).abs().mean((1, 2, 3, 4), True))", 1),
        (REAL, "x_own = add_noise(x0, noise, sigma)\n                    uncond = predict_x0(teacher, x_own, sigma, {'text': null_cond['text'].expand_as(cond['text'])})\n"
               "                    x0_teacher = uncond + args.guidance_scale * (predict_x0(teacher, x_t, sigma, cond) - uncond)", 1),
        ("dmd_gradient(x0, x0_teacher, x0_fake)\n                loss", "dmd_gradient(x0, x0_fake, x0_teacher)\n                loss", 1),
    ]),
    "codmd.py": (f"{MAINS} test_codmd", [
        (RELATION, RELATION.replace("x0_teacher, x0_fake", "x0_fake, x0_teacher"), 1),
        (RELATION, RELATION.replace("x0,", "x_t,"), 1),
        (RELATION, RELATION.replace("x0,", "add_noise(x0, noise, sigma),"), 1),
        ("loss + args.relation_weight * relation", "loss + 2 * args.relation_weight * relation", 1),
        ('reduce(x, "b c f h w -> b c", "mean")', "x[:, :, 0].mean((2, 3))", 1),
        ('reduce(x, "b c f h w -> b f c", "mean")', 'reduce(x, "b c f h w -> b f c", "max")', 1),
        ("(args.sample_relation, args.frame_relation,", "(args.frame_relation, args.sample_relation,", 1),
        ("(s - (f - r))", "(s - (r - f))", 1),
        ("dmd_gradient(x0, x0_teacher, x0_fake)\n                loss", "dmd_gradient(x0, x0_fake, x0_teacher)\n                loss", 1),
    ]),
    "phased_dmd.py": (f"{MAINS} test_phased", [
        ("students = dict(zip(args.phase_ends, [*experts, student]))", "students = dict(zip(args.phase_ends, [student] * phases))", 1),
        ('1 + int(shared.uniform("exit") * len(own))', "1", 1),
        ('1 + int(shared.uniform("exit") * len(own))', "len(own)", 1),
        ("loss = student_loss(x0, grad)", "loss = student_loss(x_s, grad)", 1),
        ("dmd_gradient(x0, x0_teacher, x0_fake)\n", "dmd_gradient(x_s, x0_teacher, x0_fake)\n", 1),
        ("dmd_gradient(x0, x0_teacher, x0_fake)\n", "dmd_gradient(x0, x0_fake, x0_teacher)\n", 1),
        ("            student_optimizer.state.clear()\n", "", 1),
        ("            fake_score_optimizer.state.clear()\n", "", 1),
        (BACKWARD, "loss.backward()", 1),
        (BACKWARD, "loss.backward()", 2),
        ("1 - step * phases / args.steps % 1", "1 - step / args.steps", 1),
        ("[*experts, *[ema] * phases]", "[ema] * phases", 1),
        ("fake_score(add_noise(x0_data(), noise, sigma)", "fake_score(add_noise(x0_data(), rng.normal(shape), sigma)", 1),
        ("x_t = renoise(x_s, noise, sigma, end)\n                    x0_fake", "x_t = add_noise(x_s, noise, sigma)\n                    x0_fake", 1),
        ("for network in (student, fake_score, ema)", "for network in (student, ema)", 1),
        ("common.ema_update(experts[-1], ema, decay=0)", "common.ema_update(experts[-1], student, decay=0)", 1),
        ("students=[*experts, ema]", "students=[ema, *experts]", 1),
        ("sample_sigma(rng, args.shift, floor,", "sample_sigma(rng, args.shift, 0.0,", 1),
        ("sample_sigma(rng, args.shift, floor,", "sample_sigma(rng, args.shift, 0.0,", 2),
        ('"betas": args.betas, ', "", 1),
    ]),
    "experiments/phased_ablations.py": (f"{MAINS} test_phased", [
        ("velocity_gradient(real, fake, last", "velocity_gradient(fake, real, last", 1),
        ("* (x0_fake - x0_teacher) / t ", "* (x0_fake - x0_teacher) ", 1),
        ("(1 - t) ** 2 / ((1 - s) * t)", "1 / ((1 - s) * t)", 1),
        ("student_loss(last[\"x_s\"], grad)", "student_loss(x0, grad)", 1),
        ("noise, sigma, 0)", "noise, sigma, s)", 1),
        ('starts[last["end"]], *score_sigmas)', "1.0, *score_sigmas)", 1),
        ('last["sigma"], last["end"])', 'last["sigma"], 0.0)', 1),
    ]),
    "models/wan.py": ("tests/test_runs.py tests/test_dmd2.py", [
        ("timestep = 1000 * sigma.float()", "timestep = (1000 * sigma).bfloat16()", 1),
        ("timestep = 1000 * sigma.float()", "timestep = 999 * sigma.float()", 1),
        ("[features[i] for i in blocks]", "list(features.values())", 1),
        ("                hook.remove()", "                pass", 1),
    ]),
    "models/wan_i2v.py": ("tests/test_models.py", [
        ("torch.cat([x_t, cond[\"image\"]], dim=1)", "torch.cat([cond[\"image\"], x_t], dim=1)", 1),
        ("mask[:, :, 0] = 1", "mask[:] = 1", 1),
        ("hidden_states[-2]", "hidden_states[-1]", 1),
        ("frames - 1, *images.shape[3:]), 0.5)", "frames - 1, *images.shape[3:]), 0.0)", 1),
        ("return cond[\"image\"][:, 4:, :1]", "return cond[\"image\"][:, 4:, 1:2]", 1),
    ]),
    "models/wan_experts.py": ("tests/test_models.py", [
        ("high = sigma >= self.boundary", "high = sigma > 1 - self.boundary", 1),
        ("part * weight", "part", 1),
    ]),
    "models/wan_5b.py": ("tests/test_models.py", [
        ("level[:, 0] = 0", "pass", 1),
        ("torch.cat([first, x_t[:, :, 1:]], dim=2), tokens", "x_t, tokens", 1),
        ("(x_t[:, :, :1] - first) / sigma", "(first - x_t[:, :, :1]) / sigma", 1),
    ]),
    "models/cosmos.py": ("tests/test_models.py", [
        ("level[:, :, :known], mask[:, :, :known] = 1e-4, 1", "mask[:, :, :known] = 1", 1),
        ("level[:, :, :known], mask[:, :, :known] = 1e-4, 1", "level[:, :, :known] = 1e-4", 1),
        ("F.gelu(F.linear(text, **projection))", "F.linear(text, **projection)", 1),
        ("transformer.crossattn_proj.forward = lambda text: text", "pass", 1),
    ]),
    "models/wan_causal.py": ("tests/test_causal.py", [
        ("angles[0, -tokens:, 0] for", "angles[0, :tokens, 0] for", 1),
        ("if past:", "if False:", 1),
        ("if rope.start + f == self.frames:", "if False:", 1),
        ("x0.new_zeros(len(x0))", "x0.new_ones(len(x0))", 1),
        ("self.past, self.new", "self.past, None", 1),
        ("own)[-blocks:] for", "own)[:blocks] for", 1),
        ("(*before, own)[", "(own,)[", 1),
        ("rope.start, rope.past = 0, ()", "pass", 1),
        ("    @torch.no_grad()\n    def update_cache", "    def update_cache", 1),
    ]),
    "models/qwen_image.py": ("tests/test_models.py", [
        ("cond[\"text\"].any(dim=-1),", "cond[\"text\"].any(dim=-1) | True,", 1),
        ("(c p q)\", p=2, q=2)", "(p q c)\", p=2, q=2)", 1),
    ]),
    "models/images.py": ("tests/test_models.py", [
        ("lines.index(line)]", "lines.index(line) - 1]", 1),
        ("image = ImageOps.exif_transpose(file)", "image = file", 1),
        ("rearrange(pixels, \"h w c -> c 1 h w\")", "rearrange(pixels.flip(2), \"h w c -> c 1 h w\")", 1),
    ]),
    "models/text.py": ("tests/test_runs.py", [("len(row) > length", "len(row) >= length", 1)]),
    "models/latents.py": (COMMON, [
        ("return (latents.float() - mean) / std", "return (latents.float() + mean) / std", 1),
        ("(latents * std + mean)", "(latents * std)", 1),
    ]),
    "common.py": (COMMON, [
        ("return torch.cat(all_gather(x))", "return x", 1),
        ("(step * grad_accum + micro) * dist.get_world_size()", "(step * grad_accum) * dist.get_world_size()", 1),
        ("dist.get_rank()) * batch_size", "0) * batch_size", 1),
        ("list(student.parameters()), 1 - decay)", "list(student.parameters()), decay)", 1),
        ("hashed(self.seed, \"epoch\", epoch)", "hashed(self.seed, \"epoch\")", 1),
        ("hashed(seed, stream, int(i))", "hashed(seed, int(i))", 1),
        ("hashed(seed, stream, int(i))", "hashed(stream, int(i))", 1),
        ("out[: len(tokens)] = tokens", "out[-len(tokens) :] = tokens", 1),
        ("else torch.float32)\n        with readable", "else torch.bfloat16)\n        with readable", 1),
        ("READER.submit(self.latents, numbers) if", "READER.submit(self.latents, range(len(numbers))) if", 1),
        ("READER.submit(self.latents, numbers))", "READER.submit(self.latents, range(len(numbers))))", 1),
    ]),
    "models/adapters.py": ("tests/test_adapters.py tests/test_phased_dmd.py", [
        ("p.shape[1] ** -0.5 if", "2 * p.shape[1] ** -0.5 if", 1),
        ("layer._active_adapter = was", "pass", 1),
        ("turned_on(self.network[0], [self.adapter_name])", "turned_on(self.network[0], [])", 1),
        ("requires_grad_(trained)", "requires_grad_(True)", 1),
    ]),
    "models/compute.py": ("tests/test_adapters.py tests/test_compute.py", [
        ("with turned_on(block, on):\n                return", "return", 1),
        ("if blocks.index(block) % every:", "if False:", 1),
        ("transformer.compile_repeated_blocks()", "pass", 1),
        ("transformer.set_attention_backend(attention)", "pass", 1),
    ]),
    "training/checkpoints.py": (COMMON, [
        (", copy=True)", ")", 1),
        ("state |= {f\"{name}_optimizer.{k}\": v", "{f\"{name}_optimizer.{k}\": v", 1),
        ("common.ema_update(networks[\"ema\"], networks[\"student\"], 0)", "pass", 1),
        ("return max(runs, key", "return min(runs, key", 1),
    ]),
    "training/run.py": (COMMON, [
        ("(packed / dist.get_world_size())", "packed", 1),
        ("load_init(self.init, networks, self.args)", "pass", 1),
    ]),
    "training/preview.py": (MAINS.removesuffix(" -k"), [
        ("number // self.seeds", "number % self.seeds", 1),
    ]),
    "evaluation/vbench.py": ("tests/test_eval_vbench.py", [
        ("(0.0009, 0.2855, 1)", "(0.0009, 0.2955, 1)", 1),
        ("(4 * quality + semantic) / 5", "(3 * quality + semantic) / 4", 1),
    ]),
}  # fmt: skip


def mutated(text, passage, other, which):
    """The text with the which-th occurrence of the passage replaced; ValueError if it has not that many."""
    parts = text.split(passage)
    if len(parts) <= which:
        raise ValueError(f"no passage {passage!r}")
    return passage.join(parts[:which]) + other + passage.join(parts[which:])


def verdict(file, tests, passage, other, which):
    text = mutated((ROOT / file).read_text(), passage, other, which)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__"))
        (copy / file).write_text(text)
        words, _, only = tests.partition(" -k ")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *words.removesuffix(" -k").split(),
        ]
        command += ["-k", only] if only else []
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {0: "lives", 1: f"dies of {failed[0].split()[1] if failed else '?'}"}.get(
        done.returncode, done.stdout[-2000:]
    )


def main(names):
    chosen = {file: plan for file, plan in MUTANTS.items() if not names or Path(file).stem in names}
    jobs = [(file, tests, *mutant) for file, (tests, mutants) in chosen.items() for mutant in mutants]
    for file, _, passage, other, which in jobs:
        mutated((ROOT / file).read_text(), passage, other, which)
    lives = 0
    with ThreadPoolExecutor(2) as pool:
        for (file, _, passage, other, which), said in zip(jobs, pool.map(lambda job: verdict(*job), jobs)):
            lives += not said.startswith("dies")
            print(f"{file} ({which}): {passage!r} -> {other!r}: {said}", flush=True)
    print(f"{len(jobs)} mutants, {lives} live")
    return lives


if __name__ == "__main__":
    if "--list" in sys.argv:
        for file, (_, mutants) in MUTANTS.items():
            print(*(f"{file} ({which}): {passage!r} -> {other!r}" for passage, other, which in mutants), sep="\n")
    else:
        sys.exit(bool(main(sys.argv[1:])))
