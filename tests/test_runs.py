"""Whole runs of dmd.py on the tiny teacher: resume, ranks, bad input, what they leave on disk."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import dfd
import dmd
import dmd2
from tests.conftest import ROOT, distance, only_run, popen, same, small_args, student_weights, train_on_ranks
from tiny import world as tiny
from training.checkpoints import check_checkpoint, flat_state, load_networks
from training.files import UMASK, read_prompts, stamps, write_shard, written_aside
from training.finished import load_run
from training.flags import one_line_errors, parse_args, with_recipe
from training.run import Run

PROGRAMS = ["dmd.py", "dmd2.py", "dfd.py", "codmd.py", "phased_dmd.py", "eval_vbench.py"]
PROGRAMS += [
    f"{room}/{path.name}" for room in ("tools", "experiments") for path in sorted((ROOT / room).glob("[a-z]*.py"))
]
TEACHER = ROOT / "tiny" / "teacher"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def teacher_weights():
    return load_file(TEACHER / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_run_leaves_everything_a_reader_needs(tmp_path, capsys):
    dmd.main(small_args(runs_dir=tmp_path, preview_every=2, save_every=1, keep=2))
    run = only_run(tmp_path)
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step_0000002", "step_0000003"]  # --keep 2
    assert json.loads((run / "args.json").read_text())["steps"] == 3
    assert (run / "dmd.py").read_text() == (ROOT / "dmd.py").read_text()
    assert (run / "revision.txt").read_text().strip()

    previews = sorted(path.name for path in (run / "previews").glob("*.png"))
    assert previews == ["data.png", "step_0000000.png", "step_0000002.png", "step_0000003.png", "teacher.png"]
    assert len(list((run / "previews" / "step_0000003").glob("*.mp4"))) == 4
    table = (run / "previews" / "table.md").read_text()
    assert "| diversity |" in table and "| right |" in table and table in capsys.readouterr().out + "\n"

    events = EventAccumulator(str(run)).Reload()
    names = {"loss/student", "loss/regression", "loss/fake_score", "grad_norm/student", "grad_norm/fake_score"}
    assert names | {
        "time/step",
        "preview/diversity",
        "preview/right",
        "preview_teacher/right",
        "preview_data/motion",
    } <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/student")] == [0, 1, 2]
    assert set(events.Tags()["images"]) == {"preview/sheet", "preview_teacher/sheet", "preview_data/sheet"}
    sheet = Image.open(run / "previews" / "step_0000003.png")
    last = events.Images("preview/sheet")[-1]
    assert last.step == 3 and (last.width, last.height) == sheet.size


def test_stock_diffusers_loads_the_student(tmp_path):
    dmd.main(small_args(runs_dir=tmp_path, steps=1))
    folder = only_run(tmp_path) / "checkpoints" / "step_0000001" / "student"
    student = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert not same(dict(student.state_dict()), teacher_weights())
    pipe = WanPipeline.from_pretrained(TEACHER, transformer=student)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a red circle", height=32, width=32, num_frames=9, num_inference_steps=1, guidance_scale=1.0).frames[0]
    assert video.shape == (9, 32, 32, 3)


def test_before_the_first_step_all_networks_are_the_teacher():
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    for role in ("teacher", "student", "fake_score", "ema"):
        network = model.load_network(role, device)
        assert same(dict(network.transformer.state_dict()), teacher_weights())
        assert all(p.requires_grad == (role in ("student", "fake_score")) for p in network.parameters())


def test_the_family_calls_the_transformer_as_the_pipeline_does():
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    network, text = model.load_network("teacher", device), torch.randn(2, model.text_length, model.text_dim)
    stock = WanTransformer3DModel.from_pretrained(TEACHER, subfolder="transformer")
    x_t, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.937])
    expected = stock(x_t, 1000 * sigma, text, return_dict=False)[0]
    torch.testing.assert_close(network(x_t, sigma, {"text": text})[0], expected)


def test_the_timestep_is_not_rounded_to_bf16():
    """937 would become 936."""
    device, model, seen = common.init_distributed(), common.Model("tiny", 9, 32, 32), []
    network = model.load_network("teacher", device, dtype=torch.bfloat16)
    network.transformer.condition_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(torch.randn(1, *model.latent_shape), torch.tensor([0.937]), {"text": torch.randn(1, 16, model.text_dim)})
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [937.0]


def test_latents_and_text_are_those_of_the_stock_pipeline(tmp_path):
    """Ours: encode_text and Wan.decode. Theirs: WanPipeline.encode_prompt, and its decoding of given latents."""
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    pipe = WanPipeline.from_pretrained(TEACHER)
    prompts = ["a red circle", "a  blue\tsquare", ""]
    expected = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=model.text_length)[0]
    ours = common.encode_text(model, prompts, tmp_path, device).cond_of([0, 1, 2])["text"]
    torch.testing.assert_close(ours, expected)

    vae, video = model.load_vae(device), torch.rand(1, 3, 9, 32, 32)
    latents = common.encode(vae, video)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(latents, (vae.encode(2 * video - 1).latent_dist.mode() - mean) / std)
    pipe.set_progress_bar_config(disable=True)
    kept = []

    def keep(pipe, i, t, tensors):
        kept.append(tensors["latents"])
        return {"latents": latents}

    theirs = pipe("a red circle", height=32, width=32, num_frames=9, num_inference_steps=1, guidance_scale=1.0,
                  callback_on_step_end=keep, output_type="pt").frames  # fmt: skip
    ours = common.decode(vae, latents).clamp(0, 1)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, atol=1e-4, rtol=0)
    assert kept[0].shape == latents.shape


# ------------------------------------------------------------------------------------------------------------ resume


def test_sigkill_at_a_random_moment_then_resume_is_exact(tmp_path):
    steps = 12
    dmd.main(small_args(runs_dir=tmp_path / "unbroken", steps=steps, save_every=2))
    broken = popen(runs_dir=tmp_path / "broken", steps=steps, save_every=2)
    first = []
    while not first and broken.poll() is None:
        time.sleep(0.05)
        first = list((tmp_path / "broken").glob("dmd__*/checkpoints/step_*[0-9]"))
    time.sleep(random.uniform(0, 2))
    broken.kill()
    broken.communicate()
    assert first
    dmd.main(small_args(runs_dir=tmp_path / "broken", steps=steps, save_every=2, resume="latest"))
    assert same(student_weights(tmp_path / "unbroken", steps), student_weights(tmp_path / "broken", steps))


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path, program):
    """harness comes before torch, whose OpenMP reads when it is loaded how its threads are to wait."""
    text = "import os, signal, time\nassert os.environ['OMP_WAIT_POLICY'] == 'passive'\n"
    (tmp_path / "torch.py").write_text(text + "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    env.pop("OMP_WAIT_POLICY", None)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs begin with it ignored
    run = subprocess.run([sys.executable, ROOT / program], env=env, capture_output=True, text=True, preexec_fn=heard)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_before_training_is_no_traceback_and_leaves_no_run(tmp_path):
    running = popen(runs_dir=tmp_path, num_samples=10_000)
    said = ""
    while "teacher samples" not in said and running.poll() is None:
        said += running.stderr.read(1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT and "Traceback" not in said + err
    assert not list(tmp_path.glob("dmd__*"))


def test_sigterm_saves_and_a_run_folder_resumes(tmp_path, capsys):
    running = popen(runs_dir=tmp_path, steps=1000, save_every=1000)
    while not list(tmp_path.glob("dmd__*/events*")) and running.poll() is None:
        time.sleep(0.05)
    time.sleep(3)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    (checkpoint,) = (only_run(tmp_path) / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    dmd.main(small_args(runs_dir=tmp_path, steps=step + 1, resume=str(only_run(tmp_path))))
    assert not same(student_weights(tmp_path, step), student_weights(tmp_path, step + 1))
    assert f"resuming with --steps {step + 1}, it was 1000" in capsys.readouterr().out


def test_ctrl_c_saves_though_torchrun_repeats_it(tmp_path):
    """A terminal signals the whole group, and torchrun passes its own signal on to its processes."""
    running = popen(runs_dir=tmp_path, steps=1000, save_every=1000)
    while not list(tmp_path.glob("dmd__*/events*")) and running.poll() is None:
        time.sleep(0.05)
    time.sleep(3)
    for _ in range(3):
        running.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT and "Traceback" not in err
    (checkpoint,) = (only_run(tmp_path) / "checkpoints").iterdir()
    check_checkpoint(checkpoint)


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    run = Run(dmd.__file__, small_args(runs_dir=tmp_path))
    clock = iter((0.0, 1.0, 10.0))  # of the first signal, and of each Ctrl-C after it
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        run.on_signal(number, None)
    assert run.stop_signal() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run.on_signal(signal.SIGINT, None)


def logged(runs_dir):
    """{name: values} of the losses and gradient norms of the only run there."""
    events = EventAccumulator(str(only_run(runs_dir))).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("loss/", "grad_norm/"))]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def test_two_ranks_match_one_and_resume_across_world_sizes(tmp_path):
    """Two gloo processes with batch b, and one with batch 2b or with two micro-batches: the same weights.

    Measured: 6e-5 of the distance travelled, which is what float32 sums in another order cost Adam in four steps.
    """
    dmd.main(small_args(runs_dir=tmp_path / "one", steps=4, batch_size=4, save_every=2))
    # previews too: a forward without gradient leaves FSDP2's root unsharded, and the average must survive it
    train_on_ranks(2, dmd, runs_dir=tmp_path / "two", steps=4, batch_size=2, save_every=2, preview_every=2)
    dmd.main(small_args(runs_dir=tmp_path / "micro", steps=4, batch_size=2, grad_accum=2))
    start, one = teacher_weights(), student_weights(tmp_path / "one", 4)

    for other in ("two", "micro"):
        assert distance(student_weights(tmp_path / other, 4), one) < 1e-3 * distance(start, one)
        for name, values in logged(tmp_path / "one").items():
            assert logged(tmp_path / other)[name] == pytest.approx(values, rel=1e-2), "means over all ranks"

    # half of it on two ranks, the rest on one
    checkpoints = only_run(tmp_path / "two") / "checkpoints"
    shutil.rmtree(checkpoints / "step_0000004")
    dmd.main(small_args(runs_dir=tmp_path / "two", steps=4, batch_size=4, resume=str(checkpoints / "step_0000002")))
    assert distance(student_weights(tmp_path / "two", 4), one) < 1e-3 * distance(start, one)

    # half of it on one rank, the rest on two; activations recomputed
    checkpoints = only_run(tmp_path / "one") / "checkpoints"
    shutil.rmtree(checkpoints / "step_0000004")
    flags = {"resume": str(checkpoints / "step_0000002"), "gradient_checkpointing": 1}
    two = popen(2, runs_dir=tmp_path / "one", steps=4, batch_size=2, save_every=2, **flags)
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err[-3000:]
    assert distance(student_weights(tmp_path / "one", 4), one) < 1e-3 * distance(start, one)


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    for flag in (0, 1, 2):
        dmd.main(small_args(runs_dir=tmp_path / str(flag), steps=2, gradient_checkpointing=flag))
    plain = student_weights(tmp_path / "0", 2)
    assert all(same(plain, student_weights(tmp_path / every, 2)) for every in ("1", "2"))


def test_accumulated_noise_is_not_repeated(tmp_path):
    data = common.TinyWorld(common.Model("tiny", 9, 32, 32), tmp_path, torch.device("cpu"), 0)
    batches = [rng.numbers for step in range(3) for rng, _, _ in data.micro_batches("student", step, 4, 2)]
    assert [number for numbers in batches for number in numbers] == list(range(24))


def test_clips_are_read_only_when_asked_for(tmp_path):
    data = common.TinyWorld(common.Model("tiny", 9, 32, 32), tmp_path, torch.device("cpu"), 0)
    (_, _, first), (_, _, second) = data.micro_batches("student", 0, 2, 2)
    assert data.vae is None
    assert torch.equal(first(), data.latents(range(2))) and torch.equal(second(), data.latents(range(2, 4)))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"teacher": "wan9.9"}, ["unknown teacher", "wan9.9", "wan2.1-1.3b"]),
        ({"teacher": "wan9.9/here", "init": "dmd2"}, ["unknown teacher", "no such folder"]),
        ({"teacher": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, ["do you mean wan2.1-1.3b?"]),
        ({"teacher": "nvidia/Cosmos-Predict2.5-2B"}, ["do you mean cosmos2.5-2b?"]),
        ({"prompts": "missing.txt"}, ["--prompts: no such file or folder missing.txt"]),
        ({"steps": 0}, ["--steps", "at least 1"]),
        ({"batch_size": 0}, ["--batch-size", "at least 1"]),
        ({"lr": -1.0}, ["--lr"]),
        ({"ema_decay": 1.5}, ["--ema-decay", "at least 0 and at most 1"]),
        ({"guidance_scale": float("nan")}, ["--guidance-scale", "nan"]),
        ({"lr": float("inf")}, ["--lr", "inf"]),
        ({"frames": 10}, ["--frames"]),
        ({"height": 33}, ["--height", "multiple of"]),
        ({"height": 64}, ["tiny world is 32 x 32"]),
        ({"frames": 17}, ["clips of the tiny world have 9 frames"]),
        ({"resume": "latest"}, ["--resume latest", "no checkpoint"]),
        ({"resume": "nowhere"}, ["--resume", "nowhere"]),
        ({"data": "nowhere"}, ["--data: no such file or folder nowhere"]),
        ({"data": "tests"}, ["shards in tests"]),
        ({"pairs": "nowhere"}, ["--pairs: no such file or folder nowhere"]),
    ],
)
def test_bad_flags(tmp_path, fails, flags, words):
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path / "runs", **flags)), *words)
    assert not list(tmp_path.glob("runs/dmd__*")), "nothing half-written"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no prompts"]),
        ("a red circle\n\na blue square\n", ["line 2", "empty"]),
        (b"\xff\xfe", ["cannot read"]),
        (b"a \0 circle", ["NUL"]),
    ],
)
def test_bad_prompt_files(tmp_path, fails, text, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path / "runs", prompts=str(path))), "prompts.txt", *words)
    assert not list(tmp_path.glob("runs/dmd__*"))


def test_prompt_files_of_other_editors(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red\u2028circle\r\na blue square\r\n".encode())
    assert read_prompts(path) == ["a red\u2028circle", "a blue square"]


def test_a_table_is_not_taken_for_prompts(tmp_path, fails):
    for name, text in (
        ("a.csv", "file_name;title\n1.mp4;a red circle\n"),
        ("a.jsonl", '{"text": "a red circle, large"}\n'),
        ("a.txt", "prompt\n1, a red circle, large\n"),
    ):
        (path := tmp_path / name).write_text(text)
        fails(partial(read_prompts, path), name, "is a table", "one prompt per line")
    (tmp_path / "b.txt").write_text("a text, a prompt\n{a red circle}\n")  # no header
    assert read_prompts(tmp_path / "b.txt") == ["a text, a prompt", "{a red circle}"]
    (tmp_path / "b.txt").write_text("text\n")
    assert read_prompts(tmp_path / "b.txt") == ["text"]


def test_what_a_prompt_loses_is_told_once(tmp_path, capsys):
    device, model = common.init_distributed(), common.Model("tiny", 9, 32, 32)
    whole = "a red circle " * (model.text_length // 3)  # with the end's token exactly as long as may be
    prompts = ["a red circle", "a red dragon", "a red circle " * 40, whole]
    common.encode_text(model, prompts, tmp_path, device)
    said = capsys.readouterr().out
    assert "1 of 4 prompts have words that the tokenizer does not know, the first: 'a red dragon'" in said
    assert f"1 of 4 prompts are cut at the text encoder's {model.text_length} tokens" in said
    common.encode_text(model, prompts, tmp_path, device)
    common.encode_text(model, tiny.CAPTIONS, tmp_path, device)
    assert capsys.readouterr().out == ""


def make_shard(path, teacher, n=3, **changes):
    shape = (n, *teacher.latent_shape)
    tensors = {"latents": torch.randn(shape), "noise": torch.randn(shape)} | changes
    write_shard(path, ["a red circle"] * n, [torch.randn(4, teacher.text_dim)] * n, **tensors)


@pytest.mark.parametrize("flag", ["data", "pairs"])
def test_shards_train_and_bad_ones_are_named(tmp_path, fails, flag):
    model, good = common.Model("tiny", 9, 32, 32), tmp_path / "shards" / "0.safetensors"
    good.parent.mkdir()
    make_shard(good, model)
    flags = {"runs_dir": tmp_path / "runs", flag: str(good.parent)}
    dmd.main(small_args(steps=1, **flags))
    runs = list(tmp_path.glob("runs/dmd__*"))

    whole, bad = good.read_bytes(), tmp_path / "shards" / "1.safetensors"
    for content, words in (
        (whole[:-100], ["corrupt, cut or no shard"]),
        (b"not a shard", ["corrupt, cut or no shard"]),
    ):
        bad.write_bytes(content)
        fails(lambda: dmd.main(small_args(**flags)), "1.safetensors", *words)
    make_shard(bad, model, latents=torch.randn(3, 16, 2, 2, 2))
    fails(lambda: dmd.main(small_args(**flags)), "1.safetensors", "0.latents is (16, 2, 2, 2)", "need (8, 5, 8, 8)")
    whole = load_file(good)
    for changes, prompts, words in (
        ({"1.text": torch.zeros(4)}, '["", "", ""]', ["1.text is (4,)", "need (4, 32)"]),
        ({"1.text": torch.zeros(4, 33)}, '["", "", ""]', ["1.text is (4, 33)", "need (4, 32)"]),
        ({}, '["", "", "", ""]', ["3.text is missing"]),
        ({}, "3", ["its prompts are no list"]),
        ({}, "not JSON", ["1.safetensors", "no shard"]),
    ):
        save_file(whole | changes, bad, metadata={"prompts": prompts})
        fails(lambda: dmd.main(small_args(**flags)), "1.safetensors", *words)
    save_file(whole, bad)
    fails(lambda: dmd.main(small_args(**flags)), "1.safetensors", "no shard")
    assert list(tmp_path.glob("runs/dmd__*")) == runs


def test_unwritable_run_folder(tmp_path, fails):
    (tmp_path / "runs").write_text("a file, not a folder")
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path / "runs")), "cannot write", "--runs-dir")


def test_read_only_run_folder(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path)), "cannot write", "read-only", "--runs-dir")
    assert not any(tmp_path.iterdir())


def test_incomplete_checkpoint(tmp_path, fails):
    dmd.main(small_args(runs_dir=tmp_path, steps=1))
    checkpoint = only_run(tmp_path) / "checkpoints" / "step_0000001"
    shard = next((checkpoint / "state").iterdir())
    shard.write_bytes(shard.read_bytes()[:-10])
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, resume="latest")), "incomplete", shard.name)
    (checkpoint / "checkpoint.json").unlink()
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, resume=str(checkpoint))), "not a complete checkpoint")


@pytest.fixture
def copied_teacher(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "cut", ["download it again"]),
        ("vae/diffusion_pytorch_model.safetensors", "cut", ["download it again"]),
        ("text_encoder/model.safetensors", "cut", ["download it again"]),
        ("vae/diffusion_pytorch_model.safetensors", "gone", ["vae holds no *.safetensors"]),
        ("text_encoder/model.safetensors", "gone", ["text_encoder holds no *.safetensors"]),
        ("text_encoder/config.json", "gone", ["teacher", "config.json"]),
        ("tokenizer/tokenizer.json", "gone", ["cannot read", "teacher"]),
        ("vae", "gone", ["no vae/ folder"]),
        ("model_index.json", "gone", ["has no model_index.json"]),
        ("transformer/diffusion_pytorch_model.fp16.safetensors", "extra", ["fp16 variant"]),
    ],
)
def test_broken_teachers(tmp_path, fails, copied_teacher, part, damage, words):
    path = copied_teacher / part
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "extra":
        shutil.copy(copied_teacher / WEIGHTS, path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    args = small_args(teacher=str(copied_teacher), runs_dir=str(tmp_path / "runs"))
    fails(lambda: dmd.main(args), Path(part).name if damage == "cut" else "teacher", *words)
    assert not list(tmp_path.glob("runs/dmd__*")) and not list(tmp_path.glob("runs/cache/pairs*"))


def test_two_experts_need_a_boundary(tmp_path, fails, copied_teacher):
    """Else the folder would train in silence against the high-noise expert alone."""
    shutil.copytree(copied_teacher / "transformer", copied_teacher / "transformer_2")
    index = json.loads((copied_teacher / "model_index.json").read_text())
    (copied_teacher / "model_index.json").write_text(
        json.dumps(index | {"transformer_2": ["diffusers", "WanTransformer3DModel"]})
    )
    args = small_args(teacher=str(copied_teacher), runs_dir=str(tmp_path / "runs"))
    fails(lambda: dmd.main(args), "boundary_ratio", "two experts")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "WanImageToVideoPipeline"}, "8 channels, and image-to-video is 20"),
        ({"_class_name": "HunyuanVideoPipeline"}, "known are WanPipeline"),
    ],
)
def test_teachers_of_other_families_are_refused_before_any_work(tmp_path, fails, copied_teacher, changes, words):
    index = json.loads((copied_teacher / "model_index.json").read_text())
    (copied_teacher / "model_index.json").write_text(json.dumps(index | changes))
    size = dict(frames=9, height=32, width=32)
    fails(lambda: dmd.main(small_args(teacher=str(copied_teacher), runs_dir=str(tmp_path / "runs"), **size)), words)


def test_a_process_that_does_not_see_the_runs_folder(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", lambda seen, value: seen.__setitem__(slice(None), [False]))
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path)), "1 of 1 processes do not see", "--runs-dir")
    assert not list(tmp_path.iterdir())


def test_a_teacher_needs_no_scheduler(tmp_path, copied_teacher):
    """The Hub's snapshot is asked for five parts only."""
    shutil.rmtree(copied_teacher / "scheduler")
    dmd.main(small_args(teacher=str(copied_teacher), runs_dir=str(tmp_path / "runs"), steps=1))


def test_a_copy_of_the_tiny_teacher_is_one(tmp_path, copied_teacher):
    """Same recipe, same world: a teacher that was trained again is distilled by --teacher alone."""
    args = small_args(teacher=str(copied_teacher), runs_dir=tmp_path, steps=1)
    assert args.lr == dmd.RECIPES["tiny"]["lr"] and args.frames == 9
    dmd.main(args)
    assert not same(student_weights(tmp_path, 1), load_file(copied_teacher / WEIGHTS))


def test_clips_longer_than_the_rotary_embedding(tmp_path, fails, copied_teacher):
    flags = {"frames": 9, "height": 480, "width": 832, "prompts": __file__, "runs_dir": str(tmp_path)}
    fails(lambda: dmd.main(small_args(teacher=str(copied_teacher), **flags)), "104 patches", "64", "--width")


def test_nan_stops_with_code_1_and_keeps_the_last_checkpoint(tmp_path, fails, monkeypatch):
    calls, flow_loss = [], dmd.flow_loss

    def breaks(*args):
        calls.append(None)
        return flow_loss(*args) * (float("nan") if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(dmd, "flow_loss", breaks)
        run = lambda: dmd.main(small_args(runs_dir=tmp_path / "broken", steps=5, save_every=1))  # noqa: E731
        fails(run, "loss/fake_score is nan at step 3", "last checkpoint is", "step_0000003", code=1)
    checkpoints = sorted(path.name for path in (only_run(tmp_path / "broken") / "checkpoints").iterdir())
    assert checkpoints == ["step_0000001", "step_0000002", "step_0000003"]
    dmd.main(small_args(runs_dir=tmp_path / "broken", steps=5, resume="latest"))  # it is whole, and good
    dmd.main(small_args(runs_dir=tmp_path / "unbroken", steps=5))
    assert same(student_weights(tmp_path / "broken", 5), student_weights(tmp_path / "unbroken", 5))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, fails, monkeypatch):
    save, calls = dcp.save, []

    def full(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", full)
    run = lambda: dmd.main(small_args(runs_dir=tmp_path, save_every=1))  # noqa: E731
    fails(run, "cannot write", "step_0000002", "No space left", "last checkpoint is", "step_0000001", code=1)
    (checkpoint,) = (only_run(tmp_path) / "checkpoints").iterdir()
    check_checkpoint(checkpoint)


def test_resuming_an_earlier_checkpoint_makes_a_run_of_its_own(tmp_path, capsys):
    dmd.main(small_args(runs_dir=tmp_path, save_every=1))
    run = only_run(tmp_path)
    dmd.main(small_args(runs_dir=tmp_path, save_every=1, resume=str(run / "checkpoints" / "step_0000001")))
    assert "not the last of its run" in capsys.readouterr().out
    assert len(list((run / "checkpoints").iterdir())) == 3
    (other,) = set(tmp_path.glob("dmd__*")) - {run}
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == ["step_0000002", "step_0000003"]
    ends = [load_file(folder / "checkpoints/step_0000003/student" / WEIGHTS) for folder in (run, other)]
    assert same(*ends)
    dmd.main(small_args(runs_dir=tmp_path, steps=4, resume=str(other)))  # and goes on as any run
    assert (other / "checkpoints" / "step_0000004").is_dir()


def test_another_global_batch_is_said(tmp_path, capsys):
    dmd.main(small_args(runs_dir=tmp_path, steps=1, batch_size=4))
    dmd.main(small_args(runs_dir=tmp_path, steps=2, batch_size=2, grad_accum=2, resume="latest"))
    assert "not exactly" not in capsys.readouterr().out
    dmd.main(small_args(runs_dir=tmp_path, steps=3, batch_size=2, grad_accum=1, resume="latest"))
    out = capsys.readouterr().out
    assert "2 samples per update, there were 4" in out and "resuming with --grad-accum 1, it was 2" in out


def test_names_of_teachers_that_are_patterns_or_long(tmp_path, copied_teacher):
    for name in ("wan[v2]", "w" * 200):
        teacher = copied_teacher.rename(tmp_path / name)
        flags = {"teacher": str(teacher), "runs_dir": str(tmp_path / "runs"), "gan_weight": 0.0}
        dmd2.main(small_args(dmd2, steps=1, **flags))
        dmd2.main(small_args(dmd2, steps=2, resume="latest", **flags))
        dfd.main(small_args(dfd, steps=1, init="dmd2", **flags))
        copied_teacher = teacher


def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path, fails):
    def full():
        with written_aside(tmp_path / "shard.safetensors") as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    fails(full, "cannot write", "shard.safetensors", "No space left", code=1)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_full_disk_ends_every_program_in_one_line(monkeypatch, capsys):
    """Wherever it is met: a log, a sheet, a table. Another error of the system's is a bug, and shows."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/events")
    assert capsys.readouterr().err == (
        "error: cannot write: runs/events: No space left on device; free some space, then go on\n"
    )
    with pytest.raises(ConnectionError), one_line_errors():
        raise ConnectionError


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    """TensorBoard writes in a thread of its own, which says nothing beside it."""
    code = (
        "from training.flags import one_line_errors; import dmd; from training.run import Run\n"
        "from tensorboard.compat.tensorflow_stub.io import gfile\n"
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "gfile.LocalFileSystem.append = full\n"
        "from tests.conftest import small_args\n"
        f"with one_line_errors(): dmd.main(small_args(runs_dir={str(tmp_path)!r}, steps=200))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.strip() and "|" not in line]  # beside progress bars
    assert run.returncode == 1 and said == ["error: cannot write: No space left on device; free some space, then go on"]


def test_a_start_passes_over_runs_without_a_checkpoint_and_tells_another_teacher(
    tmp_path, copied_teacher, capsys, fails
):
    """A disk that was full leaves an empty record of flags."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    moved = [shutil.copytree(copied_teacher, tmp_path / name / "teacher") for name in "12"]
    flags = {"runs_dir": str(tmp_path), "gan_weight": 0.0, "steps": 1}
    dmd2.main(small_args(dmd2, teacher=str(moved[0]), **flags))
    run = only_run(tmp_path, dmd2)
    capsys.readouterr()
    empty = tmp_path / f"{run.name}9"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "args.json").touch()
    for teacher in moved:
        dfd.main(small_args(dfd, init="dmd2", teacher=str(teacher), **flags))
        said = f"warning: {run} was trained with --teacher {moved[0]}, and this run has {teacher}"
        assert (said in capsys.readouterr().out) == (teacher == moved[1])
    other = {"student": torch.nn.Linear(2, 2)}
    fails(lambda: load_networks(run / "checkpoints" / "step_0000001", other), "does not fit", "another kind of teacher")


def test_saving_before_an_optimizers_first_step_changes_nothing():
    """PyTorch fills an optimizer that is to be saved by a step, and counts it: Adam's first steps would be others."""
    ends = []
    for saved in (False, True):
        network = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(network.weight)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        state = flat_state({"student": network}, {"student": optimizer}) if saved else {}
        assert all(value.count_nonzero() == 0 for key, value in state.items() if "_optimizer.state." in key)
        assert not saved or any(key.endswith(".step") for key in state)
        for scale in (1.0, 0.01):
            (scale * network(torch.ones(3))).sum().backward()
            optimizer.step()
        ends.append(network.weight.detach())
    assert torch.equal(*ends)


def test_a_sharded_transformer_is_a_student(tmp_path):
    """Every export of a 14B model is sharded."""
    WanTransformer3DModel.from_pretrained(TEACHER, subfolder="transformer").save_pretrained(
        tmp_path / "student" / "transformer", max_shard_size="500KB"
    )
    assert len(list((tmp_path / "student" / "transformer").glob("*.safetensors"))) > 1
    still = {"steps": 1, "lr": 0.0, "weight_decay": 0.0, "gan_weight": 0.0}
    for i, folder in enumerate((tmp_path / "student", tmp_path / "student" / "transformer")):
        runs = tmp_path / str(i)
        dmd2.main(small_args(dmd2, runs_dir=runs, init=str(folder), **still))
        assert same(student_weights(runs, 1, dmd2), teacher_weights())


def test_caches_are_found_by_contents(tmp_path):
    """Not by times: another machine that downloaded the same teacher finds the same cache."""
    (tmp_path / "a").write_bytes(b"1" * 10)
    before = stamps([tmp_path / "a"])
    os.utime(tmp_path / "a", (1, 1))
    assert stamps([tmp_path / "a"]) == before
    (tmp_path / "a").write_bytes(b"2" * 10)
    assert stamps([tmp_path / "a"]) != before


def test_a_finished_run_stays_what_it_was_trained_with(tmp_path):
    """Resumed with another flag it has nothing to train; its evaluation must not see that flag."""
    dmd.main(small_args(runs_dir=tmp_path, steps=2))
    run = only_run(tmp_path)
    before = (run / "args.json").read_text()
    dmd.main(small_args(runs_dir=tmp_path, steps=2, guidance_scale=9.0, resume=str(run)))
    assert (run / "args.json").read_text() == before
    dmd.main(small_args(runs_dir=tmp_path, steps=3, guidance_scale=9.0, resume=str(run)))
    (first, last) = ((run / "checkpoints" / f"step_000000{n}") for n in (2, 3))
    assert load_run(run)[1].guidance_scale == load_run(last)[1].guidance_scale == 9.0
    assert load_run(first)[1].guidance_scale == 2.0, "every checkpoint knows what it was trained with"


def test_two_processes_do_not_train_into_one_run(tmp_path, fails):
    running = popen(runs_dir=tmp_path, steps=1000, save_every=2)
    while not list(tmp_path.glob("dmd__*/checkpoints/step_*[0-9]")) and running.poll() is None:
        time.sleep(0.05)
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, steps=1000, resume="latest")), "another process trains")
    running.kill()
    running.communicate()
    run = Run(dmd.__file__, small_args(runs_dir=tmp_path, steps=1000, resume="latest"))
    assert run.open_folder() == only_run(tmp_path), "a killed process holds nothing"
    run.close()


def test_files_have_the_modes_that_umask_asks_for(tmp_path):
    dmd.main(small_args(runs_dir=tmp_path, steps=1))
    files = [path for path in tmp_path.rglob("*.safetensors")]
    assert len(files) > 3 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~UMASK}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_cluster_s_warning_save_too(tmp_path, number):
    signal.signal(number, signal.SIG_DFL)  # a test under nohup has it ignored
    run = Run(dmd.__file__, small_args(runs_dir=tmp_path))
    run.restore({}, {})
    os.kill(os.getpid(), number)
    assert run.stop_signal() == number
    run.close()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_is_ignored_stays_so(tmp_path):
    """nohup python dmd.py …: a closed terminal does not end it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = Run(dmd.__file__, small_args(runs_dir=tmp_path))
    run.restore({}, {})
    os.kill(os.getpid(), signal.SIGHUP)
    assert run.stop_signal() == 0
    run.close()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_teacher_that_gives_nan_does_not_train_in_silence(tmp_path, fails, copied_teacher):
    """Only 0 / 0 of the normaliser is hidden."""
    weights = load_file(copied_teacher / WEIGHTS)
    weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], float("nan"))
    save_file(weights, copied_teacher / WEIGHTS)
    flags = {"teacher": str(copied_teacher), "runs_dir": str(tmp_path / "runs"), "gan_weight": 0.0}
    fails(lambda: dmd2.main(small_args(dmd2, **flags)), "loss/student is nan at step 0", code=1)
    fails(lambda: dmd2.main(small_args(dmd2, preview_every=1, **flags)), "preview teacher are not finite", code=1)


@pytest.mark.parametrize(
    ("name", "content"), [("checkpoints/step_0000001/checkpoint.json", "{}"), ("args.json", "[1]")]
)
def test_damaged_records(tmp_path, fails, name, content):
    dmd.main(small_args(runs_dir=tmp_path, steps=1))
    (only_run(tmp_path) / name).write_text(content)
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, resume="latest")), Path(name).name)


def test_a_wan_preset_offline_names_the_repository(tmp_path, fails, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    args = with_recipe(dmd.Args, dmd.RECIPES, teacher="wan2.1-1.3b", runs_dir=str(tmp_path / "runs"))
    fails(lambda: dmd.main(args), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "hf download", "--teacher DIR")


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("teacher", "lr"), [("tiny", "0.001"), ("wan2.1-1.3b", "2e-06")])
def test_help_says_what_values_mean_and_whose_they_are(capsys, monkeypatch, teacher, lr):
    monkeypatch.setattr(sys, "argv", ["dmd.py", "--teacher", teacher, "--help"])
    with pytest.raises(SystemExit):
        parse_args(dmd.Args, dmd.RECIPES)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--guidance-scale" in out and "uncond + g" in out
    assert f"The values below are those of --teacher {teacher}" in out and f"(default: {lr})" in out


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_takes_the_flags_of_the_run(tmp_path, monkeypatch):
    flags = {"runs_dir": str(tmp_path), "steps": 1, "lr": 3e-4, "betas": (0.5, 0.9), "seed": 4}
    dmd.main(small_args(**flags))
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    for resume, more in (("latest", ["--seed", "4", "--runs-dir", str(moved)]), (str(only_run(moved)), [])):
        monkeypatch.setattr(sys, "argv", ["dmd.py", "--resume", resume, "--steps", "2", *more])
        args = parse_args(dmd.Args, dmd.RECIPES)
        assert vars(args) == {**vars(small_args(**flags)), "steps": 2, "resume": resume, "runs_dir": str(moved)}


def test_resume_of_what_cannot_go_on(tmp_path, fails):
    dmd.main(small_args(runs_dir=tmp_path, steps=2))
    run = only_run(tmp_path)
    before = (run / "args.json").read_text()
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, steps=1, resume="latest")), "--steps 1 is over", "2 steps")
    flags = {"runs_dir": tmp_path, "gan_weight": 0.0, "resume": str(run)}
    fails(lambda: dmd2.main(small_args(dmd2, **flags)), "no run of dmd2.py", "--init")
    assert (run / "args.json").read_text() == before and not list(tmp_path.glob("dmd2__*"))


def test_own_prompts_on_the_tiny_teacher(tmp_path):
    """Nobody knows what is right for them, so previews have no factors."""
    (tmp_path / "prompts.txt").write_text("a dog runs\na red circle\n")
    dmd.main(small_args(runs_dir=tmp_path, prompts=str(tmp_path / "prompts.txt"), steps=1, preview_every=1))
    table = (only_run(tmp_path) / "previews" / "table.md").read_text()
    assert "diversity" in table and "right" not in table
    flags = {"prompts": str(tmp_path / "prompts.txt"), "num_samples": 2, "steps": 1, "preview_every": 1}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))  # its clips are the teacher's, and so are the preview's
    table = (only_run(tmp_path, dmd2) / "previews" / "table.md").read_text()
    assert table.startswith("| | data | teacher | step_0000001 |") and "right" not in table


# ------------------------------------------------------------------------------------- found by users' mistakes


def edited(path, **changes):
    record = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del record[key]
        else:
            record[key] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"text_dim": None}, ["cannot read the configs", "text_dim"]),
        ("transformer/config.json", {"patch_size": "1,2,2"}, ["cannot read the configs"]),
        ("vae/config.json", {"latents_mean": [0.0]}, ["vae/config.json has no latents_mean for each of its z_dim"]),
        ("vae/config.json", {"latents_std": None}, ["vae/config.json has no latents_std"]),
        ("vae/config.json", {"scale_factor_spatial": 0}, ["cannot read the configs"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "16"}, ["cannot read the configs"]),
        ("model_index.json", {"transformer": None}, ["has None in transformer/"]),
        ("model_index.json", {"vae": "AutoencoderKLWan2"}, ["has AutoencoderKLWan2 in vae/"]),
        ("model_index.json", {"_class_name": None}, ["model_index.json has no _class_name"]),
    ],
)
def test_damaged_configs_of_a_teacher_are_one_line(copied_teacher, tmp_path, fails, file, changes, words):
    edited(copied_teacher / file, **changes)
    size = {"frames": 9, "height": 32, "width": 32}
    args = small_args(dmd, teacher=str(copied_teacher), runs_dir=str(tmp_path / "runs"), **size)
    fails(lambda: dmd.main(args), *words)
    assert not list((tmp_path / "runs").glob("dmd__*"))


def test_weights_that_do_not_count(copied_teacher, tmp_path, fails):
    path = copied_teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, path.with_name("copy.safetensors"))
    args = small_args(dmd, teacher=str(copied_teacher), runs_dir=str(tmp_path), frames=9, height=32, width=32)
    fails(lambda: dmd.main(args), "2 files of weights and no index")
    path.with_name("copy.safetensors").unlink()
    save_file({key: value.to(torch.int8) for key, value in load_file(path).items()}, path)
    fails(lambda: dmd.main(args), "holds I8 weights")


def test_the_image_to_video_of_a_teacher_that_has_none(copied_teacher, tmp_path, fails):
    args = small_args(dmd, runs_dir=str(tmp_path))
    fails(lambda: dmd.main(dataclasses.replace(args, teacher="tiny:i2v")), "do you mean tiny-i2v?")
    fails(lambda: dmd.main(dataclasses.replace(args, teacher=f"{copied_teacher}:i2v")), "has one task: leave out :i2v")


def test_another_tokenizer_is_another_embedding(copied_teacher, tmp_path):
    device = common.init_distributed()
    for _ in range(2):
        model = common.Model(str(copied_teacher), 9, 32, 32)
        common.encode_text(model, ["a red circle"], tmp_path, device)
        edited(copied_teacher / "tokenizer" / "tokenizer_config.json", note="another one")
    assert len(list(tmp_path.glob("text_*"))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v.to(torch.uint8) if "latents" in k else v for k, v in t.items()}, ["U8 numbers"]),
        (lambda t: {k: v[:0] if "text" in k else v for k, v in t.items()}, ["no tokens"]),
        (lambda t: {k: v * torch.nan if k == "1.latents" else v for k, v in t.items()}, ["1.latents is not finite"]),
    ],
)
def test_damaged_samples_are_named(tmp_path, fails, change, words):
    path, model = tmp_path / "shards" / "0.safetensors", common.Model("tiny", 9, 32, 32)
    path.parent.mkdir()
    make_shard(path, model)
    save_file(change(load_file(path)), path, metadata={"prompts": json.dumps(["a red circle"] * 3)})
    args = small_args(dmd2, runs_dir=tmp_path, data=str(path.parent), gan_weight=0.1, steps=2)
    code = 1 if "finite" in words[0] else 2
    fails(lambda: dmd2.main(args), str(path), *words, code=code)


def test_a_shard_with_more_samples_than_prompts(tmp_path, fails):
    path, model = tmp_path / "0.safetensors", common.Model("tiny", 9, 32, 32)
    make_shard(path, model)
    save_file(load_file(path), path, metadata={"prompts": json.dumps(["a red circle"])})
    fails(lambda: common.Shards(tmp_path, model, torch.device("cpu")), "1 prompts, and more samples")


@pytest.mark.parametrize("first", ["prompt", "Captions", '{"prompt": "a red circle"}'])
def test_a_table_is_no_list_of_prompts(tmp_path, fails, first):
    (tmp_path / "p.txt").write_text(f"{first}\na red circle\n")
    fails(lambda: read_prompts(tmp_path / "p.txt"), "line 1", "one prompt per line")


def test_what_lies_beside_checkpoints_is_none(tmp_path, fails):
    """A file manager's copy; and the folder of all checkpoints means its newest."""
    dmd.main(small_args(runs_dir=tmp_path, steps=2, save_every=1))
    run = only_run(tmp_path)
    for stray in ("step_0000002 (copy)", "step_zzz"):
        (run / "checkpoints" / stray).mkdir()
    dmd.main(small_args(runs_dir=tmp_path, steps=3, resume=str(run / "checkpoints")))
    assert (run / "checkpoints" / "step_0000003" / "checkpoint.json").is_file()
    fails(
        lambda: dmd.main(small_args(runs_dir=tmp_path, steps=4, teacher="tiny-i2v", resume=str(run))), "has the teacher"
    )
    record = run / "checkpoints" / "step_0000003" / "checkpoint.json"
    edited(record, world_size=None)
    fails(lambda: dmd.main(small_args(runs_dir=tmp_path, steps=4, resume=str(run))), "checkpoint.json is damaged")


def test_a_damaged_record_of_flags(tmp_path, fails, monkeypatch):
    dmd.main(small_args(runs_dir=tmp_path, steps=1))
    edited(only_run(tmp_path) / "args.json", batch_size="two")
    monkeypatch.setattr(sys, "argv", ["dmd.py", "--resume", str(only_run(tmp_path)), "--steps", "2"])
    fails(lambda: parse_args(dmd.Args, dmd.RECIPES), "args.json is damaged", "batch_size is 'two'")
