"""Flags that change time and memory: each run against the plain one, and what they say where they cannot be had."""

import pytest
import torch
from safetensors.torch import load_file

import dmd2
from models.presets import PRESETS
from tests.conftest import distance, only_run, small_args, student_weights, train_on_ranks

TEACHER = load_file(f"{PRESETS['tiny'].source}/transformer/diffusion_pytorch_model.safetensors")
FLAGS = {"steps": 3, "save_every": 3, "student_every": 1, "lr": 1e-3, "ema_decay": 0.0, "anneal_lr": False}
RANKS = {"lora_rank": 2, "fake_lora_rank": 3}


def trained(tmp_path, name, **flags):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / name, **FLAGS, **flags))
    return student_weights(tmp_path / name, 3, dmd2)


def near(a, b, share=1e-2):
    """Two students are as good as one, in units of how far both are from the teacher. AdamW's first steps are of one
    size whatever the gradient, so rounding shows where a gradient is next to nothing.
    """
    return distance(a, b) < share * distance(a, TEACHER) and distance(a, TEACHER) > 0.01


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": 1, **RANKS}], ids=["full", "lora"])
def test_compile(tmp_path, monkeypatch, flags):
    """What is compiled is seen to be called, so that a flag that does nothing fails."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # a killed run leaves half a file in it
    plain = trained(tmp_path, "plain", **flags)
    before = torch._dynamo.utils.counters["frames"]["ok"]
    compiled = trained(tmp_path, "compiled", compile=True, **flags)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    assert near(plain, compiled)
    assert compiled.keys() == TEACHER.keys()  # names without the compiler's


@pytest.mark.parametrize("attention", ["native", "_native_math"])
def test_attention(tmp_path, monkeypatch, attention):
    from diffusers.models import attention_dispatch

    registry, used = attention_dispatch._AttentionBackendRegistry, []
    backends, before = registry._backends, registry._active_backend
    name = attention_dispatch.AttentionBackendName(attention)
    backend = backends[name]
    monkeypatch.setitem(backends, name, lambda *args, **named: used.append(1) or backend(*args, **named))
    plain = trained(tmp_path, "plain")
    count = len(used)
    other = trained(tmp_path, "other", attention=attention)
    assert near(plain, other) and len(used) > count
    assert registry._active_backend == before, "other networks of this process have their own"


@pytest.mark.parametrize(("processes", "size", "flags"), [(2, 1, {}), (4, 2, RANKS)], ids=["copies", "two groups"])
def test_shards_within_groups_of_processes(tmp_path, processes, size, flags):
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "one", **FLAGS, **flags, batch_size=processes))
    train_on_ranks(processes, dmd2, runs_dir=tmp_path / "many", shard_size=size, **FLAGS, **flags, batch_size=1)
    assert near(*(student_weights(tmp_path / name, 3, dmd2) for name in ("one", "many")), share=2e-2)


def test_what_cannot_be_had_is_said_in_one_line(tmp_path, monkeypatch, fails):
    run = lambda **flags: lambda: dmd2.main(small_args(dmd2, runs_dir=tmp_path, **flags))
    fails(run(attention="quick"), "--attention quick", "native")
    fails(run(attention="flash"), "--attention flash", "flash")
    fails(run(shard_size=3), "--shard-size must divide the 1 processes, got 3")
    fails(run(shard_size=-1), "--shard-size must be at least 0")
    fails(run(gradient_checkpointing=-1), "--gradient-checkpointing must be at least 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(run(compile=True), "--compile needs a C++ compiler")
    assert not list(tmp_path.glob("dmd2__*"))


def test_flags_may_change_on_resume(tmp_path, capsys):
    """They are no part of what a run is."""
    flags = {**FLAGS, "save_every": 1}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "a", **{**flags, "steps": 2}))
    checkpoint = only_run(tmp_path / "a", dmd2) / "checkpoints" / "step_0000002"
    more = {"resume": str(checkpoint), "gradient_checkpointing": 2, "attention": "_native_math"}
    dmd2.main(small_args(dmd2, runs_dir=tmp_path / "a", **flags, **more))
    assert "resuming with --gradient-checkpointing 2, it was 0" in capsys.readouterr().out
    assert near(student_weights(tmp_path / "a", 3, dmd2), trained(tmp_path, "b"))
