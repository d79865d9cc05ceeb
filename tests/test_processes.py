"""Several processes train as one does, in float32 and in bf16: every family, script and feature that ranks share, once.
One launch trains all of them, one after the other.
"""

import json
from unittest import mock

import pytest
import torch

import codmd
import common
import dfd
import dmd
import dmd2
import phased_dmd
from tests import small_teachers
from tests.conftest import distance, same, state_of
from tests.ranks import adam_eps, on_ranks, train_all

EPS = 1e-6
RELATIONS = {"sample_relation": 1.0, "relation_weight": 1.0}
FAMILIES = [
    (dmd, "wan_i2v", {}),
    (dmd2, "wan_experts", {}),
    (phased_dmd, "wan_i2v_experts", {}),
    (dfd, "wan_5b", {"data_prob": 0.5, "steps": 6}),
    (dmd2, "wan_5b_i2v", {}),
    (dfd, "cosmos", {"student_input": "simulate"}),
    (codmd, "cosmos_i2v", {}),
    (dmd2, "qwen_image", {}),
]
KINDS = [
    (dmd2, "wan", {"lora_rank": 2, "fake_lora_rank": 3, "gan_weight": 0.1}),
    (codmd, "wan", {"frame_block": 1, "gan_weight": 0.0, **RELATIONS}),
]
MORE = [
    (dmd2, "wan", {"fake_lora_rank": 3, "shard_size": 1}),
    (phased_dmd, "wan", {"student": "deeper", "gan_weight": 0.1}),
    (phased_dmd, "wan_experts", {"lora_rank": 2}),
    (codmd, "wan_i2v_experts", RELATIONS),
]
GROUPS = [(dmd2, "wan", {"lora_rank": 2, "fake_lora_rank": 3, "shard_size": 2}), (codmd, "wan", RELATIONS)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    small_teachers.put_in_torchvision()
    folder = tmp_path_factory.mktemp("teachers")
    small_teachers.wan(seed=2, layers=3).save_pretrained(folder / "deeper")
    return folder


def runs_of(rows, teachers, place, **flags):
    """[(script, flags), …] of these runs, each in a folder of its own."""
    for number, (script, name, own) in enumerate(rows):
        own = {**flags, **own} | ({"student": teachers / "deeper"} if "student" in own else {})
        yield script, small_teachers.args_of(script, name, teachers, runs_dir=place / str(number), **own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "rows"), [(2, [*FAMILIES, *KINDS, *MORE]), (4, GROUPS)], ids=["two", "groups of two"]
)
def test_many_are_one(teachers, tmp_path, world, rows):
    """With batch 1 each, and one with all, up to float32 sums in another order: in each network, in units of how far
    the last updates moved it. With Adam's own eps rounding shows where a gradient is nearly zero.
    """
    flags = {"steps": 2, "student_every": 1, "lora_alpha": 4.0}
    alone = [*runs_of(rows, teachers, tmp_path / "alone", batch_size=world, save_every=1, **flags)]
    many = [*runs_of(rows, teachers, tmp_path / "many", batch_size=1, **flags)]
    with adam_eps(EPS):
        for script, args in alone:
            script.main(args)
    on_ranks(world, train_all, [(script.__name__, args) for script, args in many], EPS)
    for (script, one), (_, other) in zip(alone, many, strict=True):
        before, after = (state_of(one.runs_dir, step, script) for step in (one.steps - 1, one.steps))
        apart = state_of(other.runs_dir, one.steps, script)
        assert after.keys() == apart.keys()
        for role in ("student", "fake_score", "ema"):
            own = {key: value for key, value in after.items() if key.startswith(f"{role}.")}
            assert distance(own, apart) <= 2e-4 * distance(own, before), f"{role} of {one}"


def in_bf16(runs, told):
    """`train_all` as a GPU would: bf16 in the blocks. Writes down the dtypes of blocks and Wan's time embedders."""
    policy, load, seen = common.MixedPrecisionPolicy, common.Model.load_network, {}
    bf16 = lambda **flags: policy(**flags | ({"param_dtype": torch.bfloat16} if "param_dtype" in flags else {}))

    def watched(model, role, *args, **named):
        network = load(model, role, *args, **named, **({"dtype": torch.bfloat16} if role == "teacher" else {}))
        for last in (".to_q", ".time_embedder.linear_1"):
            note = lambda module, args, last=last: seen.setdefault(model.name, set()).add(
                f"{last} {args[0].dtype} {module.weight.dtype}"
            )
            for _, module in filter(lambda named: named[0].endswith(last), network.named_modules()):
                module.register_forward_pre_hook(note)
        return network

    with (
        mock.patch.multiple(common, MixedPrecisionPolicy=bf16),
        mock.patch.object(common.Model, "load_network", watched),
    ):
        train_all(runs)
    told.write_text(json.dumps({name: sorted(found) for name, found in seen.items()}))


@pytest.mark.slow
def test_the_cpu_stands_for_a_gpu(teachers, tmp_path):
    """Two ranks in bf16: one run also in two parts, with the same end, to the bit; then a step with each family."""
    flags = {"student_every": 1, "batch_size": 1, "keep_attention": True}
    rows = [(dmd2, "wan", {"steps": 2}), (dmd2, "wan", {"steps": 1}), (dmd2, "wan", {"steps": 2, "resume": "latest"})]
    runs = [run for row, place in zip(rows, "abb") for run in runs_of([row], teachers, tmp_path / place, **flags)]
    rows = [(*row, {**own, "steps": 1 + (row[0] is phased_dmd)}) for *row, own in (*FAMILIES, *KINDS)]
    runs += runs_of(rows, teachers, tmp_path, **flags)
    on_ranks(2, in_bf16, [(script.__name__, args) for script, args in runs], tmp_path / "told")
    for name, told in json.loads((tmp_path / "told").read_text()).items():
        float32 = [".time_embedder.linear_1 torch.float32 torch.float32"] if "wan" in name else []
        assert told == [*float32, ".to_q torch.bfloat16 torch.bfloat16"], name
    assert same(*(state_of(tmp_path / place / "0", 2, dmd2) for place in "ab"))
