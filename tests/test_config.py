"""The settings: layers in their order, and errors that name the field."""

import pytest
import yaml

from blip3o_ds.config import (
    SETTINGS,
    build_run_config,
    get_blip3o_clip_config,
    get_memory_optimized_config,
    load_run_config,
    preset_names,
)
from blip3o_ds.errors import ConfigError


def test_presets_are_those_of_the_design():
    shapes = {
        name: (m.hidden_size, m.num_layers, m.num_heads, m.num_kv_heads, m.ffn_dim)
        for name in preset_names()
        if name != "demo"
        for m in [get_blip3o_clip_config(name)]
    }

    assert shapes == {
        "tiny": (384, 6, 6, 2, 1536),
        "small": (512, 8, 8, 4, 2048),
        "base": (768, 12, 12, 4, 3072),
        "large": (1024, 16, 16, 8, 4096),
    }


def test_later_layers_win_preset_file_flag_override(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"train": {"learning_rate": 1e-3, "seed": 1, "weight_decay": 0.5}}))

    config = load_run_config("tiny", file, ["train.seed=3"], {"train.weight_decay": 0.25, "train.seed": 2})

    assert config.model.hidden_size == 384
    assert (config.train.learning_rate, config.train.weight_decay, config.train.seed) == (1e-3, 0.25, 3)


def test_a_flag_for_epochs_replaces_the_presets_steps():
    config = load_run_config("demo", flags={"train.num_epochs": 2})

    assert (config.train.num_epochs, config.train.max_steps) == (2, None)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.ema_decy=0.9", "train.ema_decay"),
        ("train.lerning_rate=1", "train.learning_rate"),
        ("eval.sampler.stps=3", "eval.sampler.steps"),
        ("trian.seed=1", "train.seed"),
        ("model.hidden_size=wide", "model.hidden_size"),
        ("train.precision=bf61", "train.precision"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("model.num_heads=5", "model.hidden_size"),
        ("model.num_kv_heads=5", "the nearest number that does is 4"),
        ("train.micro_batch_size=0", "train.micro_batch_size"),
        ("data.normalization=none", "data.normalization"),
        ("model=5", "model"),
    ],
)
def test_a_bad_setting_is_an_error_that_names_the_right_field(override, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        load_run_config("demo", overrides=[override])


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError, match=r"(?s)train\.seed.*train\.log_every"):
        build_run_config({"train": {"seed": -1, "log_every": 0}})


def test_a_number_in_exponent_notation_is_a_number():
    assert load_run_config("demo", overrides=["train.learning_rate=5e-4"]).train.learning_rate == 5e-4


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean base"):
        load_run_config("bsae")


@pytest.mark.parametrize("content", ["train: [1", "- a list"])
def test_a_broken_file_is_named(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)

    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_run_config("demo", file)


def test_a_resolved_configuration_survives_json():
    config = load_run_config("demo", overrides=["data.eval_dirs=[a, b]"])

    assert build_run_config(config.model_dump(mode="json")) == config


def test_cls_patch_adds_one_token():
    assert get_blip3o_clip_config("base").num_tokens == 256
    assert get_blip3o_clip_config("base", "cls_patch").num_tokens == 257


def test_more_memory_never_gives_a_smaller_model():
    chosen = [get_memory_optimized_config(gb) for gb in (12, 24, 80, 140)]

    widths = [config.hidden_size for _, config, _ in chosen]
    assert widths == sorted(widths)
    assert all(needed <= gb for gb, (_, _, needed) in zip((12, 24, 80, 140), chosen, strict=True))


def test_too_little_memory_is_an_error():
    with pytest.raises(ConfigError):
        get_memory_optimized_config(0.01)


def test_every_setting_has_a_meaning_and_every_alias_is_of_one_setting():
    assert all(len(setting.meaning) > 5 for setting in SETTINGS.values())
    names = [(setting.name.rpartition(".")[0], alias) for setting in SETTINGS.values() for alias in setting.aliases]
    assert len(names) == len(set(names))
    assert not {alias for _, alias in names} & {name.rpartition(".")[2] for name in SETTINGS} - {"steps", "batch_size"}


def test_a_setting_and_the_one_it_excludes_name_each_other():
    excludes = {name: setting.excludes for name, setting in SETTINGS.items() if setting.excludes}

    assert excludes == {"train.num_epochs": "train.max_steps", "train.max_steps": "train.num_epochs"}


def test_a_later_layer_replaces_the_setting_it_excludes_and_one_layer_cannot_have_both(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {num_epochs: 3}")
    assert load_run_config("demo", file).train.max_steps is None

    file.write_text("train: {num_epochs: 3, max_steps: 5}")
    with pytest.raises(ConfigError, match=r"train\.num_epochs = 3 and train\.max_steps = 5 exclude each other"):
        load_run_config("demo", file)


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS.values() if setting.choices])
def test_a_default_is_one_of_the_choices(setting):
    assert setting.default in setting.choices


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("train.batch_size", "train.micro_batch_size"),
        ("batch_size", "train.micro_batch_size"),
        ("epochs", "train.num_epochs"),
        ("train.steps", "train.max_steps"),
        ("wd", "train.weight_decay"),
        ("train.max_step", "train.max_steps"),
        ("eval.batchsize", "eval.batch_size"),
        ("foo", None),
        ("train.foo", None),
        ("train.lo", None),
    ],
)
def test_only_a_near_name_or_an_alias_is_suggested(name, suggested):
    with pytest.raises(ConfigError) as raised:
        load_run_config(overrides=[f"{name}=1"])

    if suggested:
        assert f"{name} is not a setting; did you mean {suggested}?" in str(raised.value)
    else:
        assert "did you mean" not in str(raised.value)
        assert "`blip3o-ds config` prints all settings" in str(raised.value)


def test_what_is_given_is_known_and_a_preset_gives_no_dims():
    for preset in preset_names():
        given = load_run_config(preset, overrides=["model.eva_dim=7"]).model.model_fields_set
        assert given & {name.rpartition(".")[2] for name, s in SETTINGS.items() if s.from_data} == {"eva_dim"}


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}: expected a configuration file, which cannot be read: Is a dir"):
        load_run_config("demo", tmp_path)


def test_the_printed_configuration_is_a_file_with_the_same_settings(tmp_path):
    config = load_run_config("demo", overrides=["data.eval_dirs=[a, b]", "eval.sampler.steps=3"])
    file = tmp_path / "run.yaml"
    file.write_text(SETTINGS.to_yaml(config))

    read = load_run_config(None, file)

    assert read == config
    assert not read.model.model_fields_set & {"eva_dim", "clip_dim", "grid_size"}
    assert all(setting.meaning in file.read_text() for setting in SETTINGS.values())
