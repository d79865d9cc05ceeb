"""Break one line of the code at a time and see that a test fails.

    python tests/mutants.py                   # all of them, two at a time: some 20 minutes on two cores
    python tests/mutants.py --count 10        # ten of them, others every day: what make test-all runs
    python tests/mutants.py --only codmd.py

A mutant is a copy of the repository in which a passage, which must stand in its file once, is replaced. The tests named
above it run there until one fails. "lives" means that none did, which is a defect of the tests.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAINS = "tests/test_mains.py -k"
MUTANTS = [  # (file, arguments of pytest, {passage: what replaces it})
    ("dmd.py", "tests/test_dmd.py", {
        "grad = x0_fake - x0_teacher": "grad = x0_teacher - x0_fake",
        '"b c f h w -> b 1 1 1 1", "mean")': '"b c f h w -> 1 1 1 1 1", "mean")',
        "return (shift * u / (1 + (shift - 1) * u))": "return (u / (1 + (shift - 1) * u))",
        "null_cond.get(key, x).expand_as(x), x]": "x, null_cond.get(key, x).expand_as(x)]",
    }),
    ("dmd.py", f"{MAINS} [dmd-", {
        "args.regression_weight * loss": "loss", "pairs.cond(rng.numbers)": "cond",
        "args.pairs, model, device, args.seed,": "args.pairs, model, device, 0,",
        "x_t = x0 + sigma_next / sigma * (x_t - x0)": "x_t = x0 + sigma_next * (x_t - x0)",
    }),
    ("dmd2.py", f"{MAINS} dmd2-", {
        '1 + int(shared.uniform("exit") * len(args.student_sigmas))': "len(args.student_sigmas)",
        "return F.softplus(-logits_fake).mean()": "return F.softplus(logits_fake).mean()",
        "(gan_grad * add_noise(x0, noise, sigma)).sum()": "(gan_grad * x0).sum()",
        "(gan_grad,) = torch.autograd.grad(args.gan_weight * gan_loss, x_t)": "(args.gan_weight * gan_loss).backward()\n                    gan_grad = x_t.grad",
        "fake_score(add_noise(load_x0(), noise,": "fake_score(add_noise(load_x0(), rng.normal(shape),",
        "zip(self.blocks, features,": "zip(self.blocks, features[::-1],",
        "            common.ema_update(ema,": "        common.ema_update(ema,", "students=[ema]": "students=[student]",
        'data.micro_batches("fake_score", step,': 'data.micro_batches("student", step,',
        "step % args.student_every == 0": "step % args.student_every == 1",
        "student.update_cache(video[-1], cond)": "student.update_cache(x_t, cond)",
    }),
    ("dfd.py", f"{MAINS} dfd", {
        'shared.uniform("coin")': 'shared.uniform("exit")',
        "else x0, noise, sigma)  # eq. 9": "else x0, noise, 1 - sigma)",
        'load_x0() if shared.uniform("coin") < args.data_prob else x0': 'x0 if shared.uniform("coin") < args.data_prob else load_x0()',
    }),
    ("dfd.py", "tests/test_pairs.py", {"data_prob: Unit = 0.5": "data_prob: Unit = 1.0"}),
    ("codmd.py", f"{MAINS} codmd", {
        "relation_loss(x0, x0_teacher, x0_fake, *p": "relation_loss(x0, x0_fake, x0_teacher, *p",
        "args.sample_relation, args.frame_relation": "args.frame_relation, args.sample_relation",
    }),
    ("codmd.py", "tests/test_codmd.py", {"(s - (f - t)).detach()": "(s - (f - t))"}),
    ("phased_dmd.py", f"{MAINS} phased", {
        "[*experts, student]": "[student] * len(args.phase_ends)",
        "student_loss(x0, grad)\n": "student_loss(x_s, grad)\n",
        "for network in (student, fake_score, ema)": "for network in (student, ema)",
        "1 - step * len(args.phase_ends) / args.steps % 1": "1 - step / args.steps",
        "ema_update(experts[-1], ema, decay=0)": "ema_update(experts[-1], student, decay=0)",
        "+ (1 - u) * rng": "+ rng", "(1 / b**2).clamp(max=10)": "(1 / b**2).clamp(max=100)",
        "(args.score_ends or args.phase_ends)": "args.phase_ends",
    }),
    ("phased_dmd.py", "tests/test_phased_dmd.py", {"(t - 2 * t * s + s**2)": "(t - 2 * t * s)"}),
    ("tools/ode_init.py", f"{MAINS} ode_init", {
        "(rng.uniform() * len(levels))": "(rng.uniform() * (len(levels) - 1))",
        "add_noise(x0, noise, sigma)": "add_noise(noise, x0, sigma)",
        "student.update_cache(target, cond)": "student.update_cache(x, cond)",
        "pairs.cond(rng.numbers)": "data.cond(rng.numbers)",
        "        common.ema_update(ema, student, args.ema_decay)\n": "",
        "(loss / args.grad_accum).backward()": "loss.backward()",
    }),
    ("common.py", "tests/test_common.py", {
        "hashed(seed, stream, int(i))": "hashed(seed, int(i))",
        'hashed(self.seed, "epoch", epoch)': 'hashed(self.seed, "epoch")',
        "dist.get_world_size() + dist.get_rank())": "dist.get_world_size())",
        "out[: len(tokens)] = tokens": "out[-len(tokens) :] = tokens",
        "leaf, buffer.to(device))": "leaf, buffer.to(device, dtype))",
    }),
    ("common.py", f"{MAINS} dmd2", {
        "Shards(data, model, device, seed, ": "Shards(data, model, device, 0, ",
        'if self.student and role != "teacher":': "if self.student:",
    }),
    ("training/published.py", "tests/test_published.py -k strength", {"+= strength * scale *": "+= scale *"}),
    ("models/students.py", "tests/test_student.py -k together", {'"conditions": model.conditions, ': ""}),
    ("common.py", "tests/test_codmd.py", {"return torch.cat(all_gather(x))": "return x"}),
    ("training/checkpoints.py", "tests/test_runs.py -k newest", {"max(found,": "min(found,", "max(runs,": "min(runs,"}),
    ("training/checkpoints.py", "tests/test_runs.py -k init_takes", {
        'common.ema_update(networks["ema"], networks["student"], 0)': "pass",
        "found = load_networks(path, networks)": "load_networks(path, {'student': student})",
    }),
    ("training/checkpoints.py", "tests/test_runs.py -k saving", {"value.zero_() if new else value": "value"}),
    ("training/checkpoints.py", "tests/test_adapters.py -k exported", {".to(torch.float32, copy=True)": ""}),
    ("training/run.py", "tests/test_runs.py -k finite", {
        "if not math.isfinite(value):": "if False:", "purge_step=self.step": "purge_step=0",
    }),
    ("training/run.py", "tests/test_runs.py -k two_ranks", {"(packed / dist.get_world_size())": "packed"}),
    ("training/run.py", "tests/test_runs.py -k kill", {'[: -self.args["keep"]]': '[self.args["keep"] :]'}),
    ("training/run.py", "tests/test_phased_dmd.py -k student", {"load_init(self.init, networks, self.args)": "pass"}),
    ("training/run.py", f"{MAINS} phased", {"students[i if phased else 0]": "students[0]"}),
    ("training/preview.py", f"{MAINS} dmd2", {"number // self.seeds": "number % self.seeds"}),
    ("training/preview.py", "tests/test_runs.py -k preview", {"found[number] for number in range(self.total)": "found[number] for number in found"}),
    ("training/samples.py", "tests/test_common.py -k teachers_own", {
        "model.latent_shape, model.negative_prompt, ": "model.latent_shape, ",
        "data.seed, solver_settings(args))": "data.seed)",
    }),
    ("training/samples.py", "tests/test_dmd2.py -k alone", {'SampleRNG(data.seed, "pairs"': 'SampleRNG(0, "pairs"'}),
    ("training/flags.py", "tests/test_runs.py -k flags_of_the_run", {"{**before, ": "{"}),
    ("training/metrics.py", "tests/test_metrics.py", {
        "max(s * (s - 1), 1)": "max(s * s, 1)", "(codes >= 255)": "(codes > 255)",
    }),
    ("training/files.py", "tests/test_common.py", {'"little") >> 1': '"big") >> 1'}),
    ("training/files.py", "tests/test_common.py -k stamp", {"path.stat().st_size, first(path))": "0, 0)"}),
    ("models/wan.py", "tests/test_models.py -k pipelines", {", walking backwards": ""}),
    ("models/wan.py", f"{MAINS} dmd2-", {"1000 * sigma.float()": "999 * sigma.float()", '"to_out.0", ': ""}),
    ("models/wan_5b.py", "tests/test_models.py -k pipelines", {"fps = 24": "fps = 16", "[:, 0] = 0": "[:, 0] = 1"}),
    ("models/wan_i2v.py", "tests/test_models.py -k pipelines", {
        "mask[:, :, 0] = 1": "mask[:] = 1", "_states[-2]": "_states[-1]",
    }),
    ("models/wan_experts.py", "tests/test_models.py -k experts", {">= self.boundary": "< self.boundary"}),
    ("models/wan_causal.py", "tests/test_causal.py -m not slow", {
        "-(-self.kept_frames // self.frame_block)": "self.kept_frames // self.frame_block",
        "x0.new_zeros(len(x0))": "x0.new_ones(len(x0))",
        "    @torch.no_grad()\n    def update_cache": "    def update_cache",
    }),
    ("models/text.py", "tests/test_common.py -k encoded_once", {"encode(part[i : i + 16])": "encode(part[:16])"}),
    ("models/text.py", "tests/test_models.py -k task", {"images[first : first + chunk]": "images[:chunk]"}),
    ("models/images.py", "tests/test_models.py -k images_are", {"paths[lines.index(line)]": "paths[lines.index(line) - 1]"}),
    ("models/presets.py", "tests/test_runs.py -k recipe_beats", {"I2V14B, W14B)": "I2V14B)"}),
    ("models/adapters.py", "tests/test_phased_dmd.py -k wide", {"p.shape[1] ** -0.5 if": "2 * p.shape[1] ** -0.5 if"}),
    ("models/adapters.py", "tests/test_adapters.py -m not slow", {"layer._active_adapter = was": "pass"}),
    ("tools/export.py", "tests/test_export.py -k links", {'=student.sampler == "renoise"': "=False"}),
    ("tools/export.py", "tests/test_export.py -k wan_experts and 2", {'role = f"expert_{number}"': "pass"}),
    ("tools/cost.py", "tests/test_cost.py -m not slow", {
        "8 * trained / shards": "4 * trained / shards", "own, recomputed(args, blocks) / blocks": "own, 0",
        "(counts.graphs * graph + one_block)": "(graph + one_block)", "(2.5 + self": "(2 + self",
        "reach = (self.before + x_t.shape[2]) / self.frames": "reach = 1",
    }),
    ("tools/sample.py", "tests/test_sample.py -k bits", {"cond_of([p for p, _": "cond_of([0 for p, _"}),
    ("tools/make_shards.py", "tests/test_make_shards.py -k hold", {"[number][2] for": "[number - 1][2] for"}),
    ("evaluation/vbench.py", "tests/test_eval_vbench.py -k constants or totals", {
        "(4 * quality + semantic) / 5": "(quality + semantic) / 2", "0.2855": "0.2955",
    }),
    ("evaluation/proxies.py", "tests/test_metrics.py -k vendi", {"DWIDTH = 0.15": "DWIDTH = 0.3"}),
    ("evaluation/proxies.py", "tests/test_eval_vbench.py -k flow", {"int(0.05 * len": "int(0.5 * len"}),
    ("eval_vbench.py", "tests/test_eval_vbench.py -k begins or students or negative_prompt", {
        '100_000 * item["entry"] + j': "100_000 + j",
        'cond_of([item["entry"]] * len(chunk))': "cond_of([0] * len(chunk))",
        '"negative_prompt": model.negative_prompt, ': "",
    }),
    ("experiments/evidence.py", "tests/test_evidence.py -k not hunted", {
        "values.std():.2g": "values.var():.2g", "map(kl, taught, own)": "map(kl, own, taught)",
        "(torch.arange(200) + 0.5) / 200": "(torch.arange(200) + 0.5) / 400",
        "sample(euler(steps, guidance), seed)": "sample(euler(steps, guidance), 0)",
    }),
    ("tiny/measures.py", "tests/test_tiny.py -k recovers", {
        'f["coherence"][f["clean"]]': 'f["coherence"]', "values.std()": "values.var()",
    }),
]  # fmt: skip
JOBS = [(file, tests, *change) for file, tests, changes in MUTANTS for change in changes.items()]


def mutated(file, passage, replacement):
    """The file's text with the passage replaced."""
    text = (ROOT / file).read_text()
    if text.count(passage) != 1:
        raise SystemExit(f"{file} has {text.count(passage)} times {passage!r}: mend tests/mutants.py")
    return text.replace(passage, replacement)


def verdict(job):
    """Whether the tests notice, and a line that says so."""
    file, tests, passage, replacement = job
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "site", "__pycache__"))
        (copy / file).write_text(mutated(file, passage, replacement))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split(" ", 2)]
        own = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=own, capture_output=True, text=True)
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    said = f"dies of {failed[0]}" if failed else "lives" if done.returncode == 0 else done.stdout[-2000:] + done.stderr
    return bool(failed), f"{file}: {passage!r} -> {replacement!r}: {said}"


def run(jobs):
    """Try these; returns how many live."""
    started, lives = time.perf_counter(), 0
    with ThreadPoolExecutor(2) as pool:
        for dies, said in pool.map(verdict, jobs):
            lives += not dies
            print(said, flush=True)
    print(f"{len(jobs)} mutants in {(time.perf_counter() - started) / 60:.0f} minutes, {lives} live")
    return lives


def todays(count):
    return random.Random(str(date.today())).sample(JOBS, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", help="a file")
    args = parser.parse_args()
    for file, _, *change in JOBS:
        mutated(file, *change)
    sys.exit(bool(run([job for job in (todays(args.count) if args.count else JOBS) if args.only in (None, job[0])])))
