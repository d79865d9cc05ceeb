"""tools/step_time.py: its FLOPs against PyTorch's counter over a real step, and that it leaves nothing behind."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import dmd
import dmd2
import phased_dmd
from models.folders import family_of
from models.presets import PRESETS, TINY_WORLD
from tests.conftest import small
from tools import cost, step_time
from training.flags import with_recipe
from training.run import Run


def args_of(script, **flags):
    return with_recipe(step_time.args_of(script), script.RECIPES, **{**small(script, {}), **flags})


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (dmd, {}),
        (dmd2, {"gradient_checkpointing": 1}),
        (dmd2, {"gradient_checkpointing": 2, "lora_rank": 2, "fake_lora_rank": 2}),
        (phased_dmd, {"lora_rank": 2}),
    ],
)
def test_flops_are_those_that_pytorch_counts(monkeypatch, script, flags):
    """Over steps with both updates and with the fake score's. A LoRA's own products are counted by PyTorch alone; it
    counts no fused attention on the CPU.
    """
    counter, counted, step_done = FlopCounterMode(display=False), [], step_time.Watch.step_done

    def count(watch):
        if watch.ends:
            counter.__exit__(None, None, None)
            counted.append(counter.get_total_flops())
        counter.__enter__()
        step_done(watch)

    monkeypatch.setattr(step_time.Watch, "step_done", count)
    args = args_of(script, warm_steps=2, timed_steps=4, **flags)
    with sdpa_kernel(SDPBackend.MATH):
        device, model, watch, peak = step_time.measured(script, args)
    counter.__exit__(None, None, None)
    network, flops, _ = cost.one_forward(model)
    parts = step_time.parts_of(watch, args, flops, len(network.blocks))
    fake, student = (parts[name].flops for name in ("fake-score step", "student adds"))
    both = (counted[1] + counted[3]) / 2
    assert counted[1] > 0 and peak > 1e8
    assert fake == pytest.approx((counted[2] + counted[4]) / 2, rel=0.08 if flags.get("lora_rank") else 0.05)
    assert fake + student == pytest.approx(both, rel=0.08 if flags.get("lora_rank") else 0.05)
    assert 0 < sum(parts["fake-score step"].inside.values()) < parts["fake-score step"].seconds
    inside, seconds = (
        sum(sum(part.inside.values()) for part in parts.values()),
        sum(part.seconds for part in parts.values()),
    )
    assert 0 < inside < seconds


SMALL = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32},
    "CosmosTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2, "adaln_lora_dim": 8,
    },
    "QwenImageTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "axes_dims_rope": (4, 6, 6),
    },
}  # fmt: skip


@pytest.mark.parametrize("teacher", [name for name in PRESETS if name not in TINY_WORLD])
def test_every_teacher_on_the_hub_runs_without_its_files(monkeypatch, capsys, tmp_path, teacher):
    """With its family's classes, small: losses stay finite, or Run.log of a real run would have ended it."""
    preset, losses = PRESETS[teacher], []
    kind = family_of(preset.family).transformer_class.__name__
    config = {**preset.config, **SMALL[kind]}
    config |= {"added_kv_proj_dim": 32} if "added_kv_proj_dim" in config else {}
    monkeypatch.setitem(PRESETS, teacher, preset._replace(config=config))
    monkeypatch.setattr(common, "teacher_folder", None)
    step_done = step_time.Watch.step_done
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    flags = {"frames": 1 if "qwen" in teacher else 5, "height": 64, "width": 64, "discriminator_blocks": (0, 1)}
    flags |= {"gradient_checkpointing": 1, "lora_rank": 2, "fake_lora_rank": 2, "batch_size": 1, "grad_accum": 1}
    monkeypatch.chdir(tmp_path)
    step_time.main(dmd2, args_of(dmd2, teacher=teacher, warm_steps=1, timed_steps=2, **flags))
    out = capsys.readouterr().out
    assert f"{teacher}: latents" in out and "student adds" in out
    assert len(losses) == 5 and torch.tensor(losses).isfinite().all()
    assert re.search(r"samples +student [\d.]+, fake_score 2; backward 2", out)
    assert not list(tmp_path.iterdir())
    assert step_time.Watch.step_done is step_done and "save" in vars(Run) and Run.save.__name__ == "save"
    assert common.Model.__name__ == "Model" and common.put_weights.__name__ == "put_weights"


def test_a_row_and_mistakes(capsys, fails):
    step_time.main(dmd2, args_of(dmd2, warm_steps=1, timed_steps=2, markdown=True))
    row = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| CPU, 1 threads \| dmd2 \| tiny \|( [\d.]+ \| \d+% \|){2} [\d.]+ \|", row)
    step_time.main(dmd2, args_of(dmd2, warm_steps=1, timed_steps=2, resume="a run"))  # its steps begin at 0
    fails(lambda: step_time.main(dmd2, args_of(dmd2, timed_steps=1)), "--timed-steps must be at least 2, got 1")
    fails(lambda: step_time.main(dmd2, args_of(dmd2, teacher="wan9.9")), "unknown teacher")
    fails(lambda: step_time.main(dmd2, args_of(dmd2, teacher="wan2.1-1.3b", frames=10)), "--frames")
