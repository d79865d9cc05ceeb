"""Flags that change time and memory: each against the plain network or run."""

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import distance
from tests.test_adapters import loaded, velocity


def gradients(**compute):
    """Velocity, and gradients by their names, of a LoRA on a base that runs so."""
    model, _, student, _ = loaded(**compute)
    v = velocity(student, model)
    v.square().mean().backward()
    return v, {name: p.grad for name, p in student.named_parameters()}


def near(a, b):
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)
    assert a[1].keys() == b[1].keys(), "names without the compiler's"
    assert distance(a[1], b[1]) < 1e-3 * distance(a[1], {name: 0 * g for name, g in a[1].items()})


@pytest.mark.slow
def test_compile(tmp_path, monkeypatch):
    """What is compiled is seen to be called, so that a flag that does nothing fails."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a killed run leaves half a file in it
    before = torch._dynamo.utils.counters["frames"]["ok"]
    compiled = gradients(compile=True, gradient_checkpointing=1)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    near(gradients(), compiled)


def test_attention(monkeypatch):
    registry, used = attention_dispatch._AttentionBackendRegistry, []
    before, name = registry._active_backend, attention_dispatch.AttentionBackendName("_native_math")
    backend = registry._backends[name]
    monkeypatch.setitem(registry._backends, name, lambda *args, **named: used.append(1) or backend(*args, **named))
    near(gradients(), gradients(attention="_native_math"))
    assert len(used) == 12, "self- and cross-attention of six blocks"
    assert registry._active_backend == before, "other networks of this process have their own"


class Attentions(TorchDispatchMode):
    """Counts calls of attention, not of its backward."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def test_self_attention_that_is_kept_is_not_run_again():
    """Of six blocks; cross-attention is."""
    counts, found = [], []
    for keep in (False, True):
        with Attentions() as attentions:
            found.append(gradients(gradient_checkpointing=1, keep_attention=keep))
        counts.append(attentions.calls)
    near(*found)
    assert counts == [24, 18]


@pytest.mark.parametrize("name", ["sage", "_flash_3"])
def test_attention_without_a_gradient_is_refused(fails, name):
    fails(lambda: loaded(attention=name), f"--attention {name}")
