"""DeepSpeed's settings completed from ours, and the learning rate's course."""

import json
import math

import pytest

from blip3o_ds.config import TrainConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.planning.memory import MAX_BUCKET_ELEMENTS
from blip3o_ds.training.engine import check_deepspeed_config, resolve_deepspeed_config
from blip3o_ds.training.optim import SCHEDULES, check_names, learning_rate_factor
from tests.conftest import PROJECT

SHIPPED = sorted((PROJECT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_files_resolve_with_fp32_accumulation_and_nothing_left_open(file):
    train = TrainConfig(deepspeed_config=str(file), gradient_accumulation_steps=3)

    settings = resolve_deepspeed_config(train, world_size=8, num_parameters=1000, ranks_per_node=4)

    assert settings["train_batch_size"] == 8 * 3 * 8
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert file.stem.startswith(f"zero{settings['zero_optimization']['stage']}")
    assert '"auto"' not in json.dumps(settings)


def test_the_shipped_files_are_those_of_the_readme():
    readme = (PROJECT / "ds_configs" / "README.md").read_text()

    assert [file.name for file in SHIPPED if f"`{file.name}`" not in readme] == []
    assert len(SHIPPED) == 7


def test_hpz_keeps_a_copy_of_the_weights_on_each_node():
    train = TrainConfig(deepspeed_config=str(PROJECT / "ds_configs/zero3-hpz-quantised.json"))

    settings = resolve_deepspeed_config(train, world_size=16, num_parameters=1000, ranks_per_node=4)

    assert settings["zero_optimization"]["zero_hpz_partition_size"] == 4


@pytest.mark.parametrize(
    ("parameters", "bucket"),
    [(1000, 1000), (1001, 1002), (MAX_BUCKET_ELEMENTS - 1, MAX_BUCKET_ELEMENTS), (10**9 + 1, MAX_BUCKET_ELEMENTS)],
)
def test_a_bucket_holds_the_whole_model_up_to_a_limit_and_has_an_even_size(parameters, bucket):
    zero = resolve_deepspeed_config(TrainConfig(), 1, parameters)["zero_optimization"]

    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
    assert bucket % 2 == 0


def test_a_file_that_contradicts_the_run_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 5.0}))

    with pytest.raises(ConfigError, match=r"gradient_clipping is 5\.0 there and 1\.0 by the run"):
        resolve_deepspeed_config(TrainConfig(deepspeed_config=str(file)), 1, 1000)


@pytest.mark.parametrize(("key", "value"), [("bf16", True), ("data_types", "fp32"), ("zero_optimization", 2)])
def test_a_value_where_an_object_belongs_is_refused_with_file_and_key(tmp_path, key, value):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({key: value}))

    with pytest.raises(ConfigError, match=rf"ds\.json: {key} is {value!r}; expected a JSON object"):
        resolve_deepspeed_config(TrainConfig(deepspeed_config=str(file)), 1, 1000)


OTHER_SECTIONS = {
    "activation_checkpointing": {"partition_activations": True},
    "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False},
    "tensorboard": {"enabled": False},
    "wall_clock_breakdown": False,
    "aio": {"block_size": 1048576},
}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_deepspeed_knows_every_key_of_the_shipped_files_and_of_its_other_sections(one_rank, file):
    settings = resolve_deepspeed_config(TrainConfig(deepspeed_config=str(file)), 1, 1000)
    check_deepspeed_config({**settings, **OTHER_SECTIONS}, str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is not a key .* did you mean zero_optimization?"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is not a key .* did you mean gradient_clipping?"),
        ({"zero_optimization": {"stage": 7}}, r"zero_optimization.stage = 7: input should be 0, 1, 2"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 9}},
            "zero_optimization.reduce_bucket_sise = 9: is not a key of DeepSpeed's.* did you mean reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 9}},
            "zero_optimization.stage3_prefetch_bucket = 9: .* did you mean stage3_prefetch_bucket_size",
        ),
        ({"tensorboard": {"enabled": True, "place": "x"}}, "tensorboard.place = 'x': is not a key of DeepSpeed's"),
        ({"bf16": True}, "DeepSpeed does not take it: .*BF16"),
    ],
)
def test_a_key_or_value_that_deepspeed_does_not_take_is_refused(one_rank, changes, message):
    settings = resolve_deepspeed_config(TrainConfig(), 1, 1000)
    with pytest.raises(ConfigError, match=f"^my.json: {message}"):
        check_deepspeed_config({**settings, **changes}, "my.json")


def test_an_optimizer_in_the_file_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "Adam"}}))

    with pytest.raises(ConfigError, match="optimizer is set here"):
        resolve_deepspeed_config(TrainConfig(deepspeed_config=str(file)), 1, 1000)


def test_fp16_without_zero_is_refused():
    train = TrainConfig(deepspeed_config=str(PROJECT / "ds_configs/zero0.json"), precision="fp16")

    with pytest.raises(ConfigError, match="fp16"):
        resolve_deepspeed_config(train, 1, 1000)


def test_the_learning_rate_warms_up_linearly_and_ends_a_cosine_at_its_floor():
    train = TrainConfig(warmup_steps=10, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, train, 110) for step in range(111)]

    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_schedule_from_outside_is_one_function_and_one_table_line(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "linear", lambda progress, floor: 1 - (1 - floor) * progress)
    train = TrainConfig(schedule="linear", warmup_steps=10, min_lr_ratio=0.2)

    check_names(train)

    assert [learning_rate_factor(step, train, 110) for step in (0, 10, 60, 110)] == pytest.approx([1 / 11, 1, 0.6, 0.2])


@pytest.mark.parametrize(("setting", "known"), [("schedule", "cosine"), ("optimizer", "adamw")])
def test_an_unknown_schedule_or_optimizer_is_refused_with_the_list(setting, known):
    with pytest.raises(ConfigError, match=rf"train\.{setting} = 'muon' is unknown.*{known}"):
        check_names(TrainConfig(**{setting: "muon"}))
