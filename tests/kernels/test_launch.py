"""Launch configurations: the rule, and the table of measured ones."""

import json

import pytest
import torch

from blip3o_kernels import launch
from blip3o_kernels.launch import (
    RowConfig,
    SumConfig,
    arch_of,
    as_rows,
    assume_arch,
    choose,
    force_config,
    record,
    row_config,
    shape_class,
    tuned_table,
)
from tests.kernels.accuracy import DEVICE


class OnGpu:
    """What `choose` asks of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(launch, "TUNED_PATH", path)
    monkeypatch.setattr(launch, "gpu_name", lambda index: "Some GPU")
    tuned_table.cache_clear()
    yield path
    tuned_table.cache_clear()


def test_the_shipped_table_is_there():
    assert isinstance(tuned_table(launch.TUNED_PATH), dict)


def test_a_recorded_configuration_is_chosen_for_its_gpu_operation_and_class_alone(table):
    default, measured = RowConfig(4, 4), RowConfig(8, 2)
    key = shape_class(torch.bfloat16, D=1024)
    assert key == "bfloat16 D=1024"

    record("Some GPU", "rms_norm", key, measured, table)
    record("Some GPU", "rms_norm", shape_class(torch.float32, D=1024), RowConfig(2, 2), table)
    record("Another GPU", "rms_norm", key, RowConfig(1, 1), table)

    assert choose("rms_norm", key, OnGpu, default) == measured
    assert choose("sandwich", key, OnGpu, default) == default
    assert choose("rms_norm", shape_class(torch.bfloat16, D=768), OnGpu, default) == default
    assert choose("rms_norm", key, torch.ones(1), default) == default
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


def test_a_forced_configuration_holds_for_its_operation_within_its_block(table):
    record("Some GPU", "rms_norm", "any", RowConfig(8, 2), table)
    with force_config("rms_norm", RowConfig(16, 8)):
        assert choose("rms_norm", "any", OnGpu, RowConfig(4, 4)) == RowConfig(16, 8)
        assert choose("rms_norm", "any", torch.ones(1), RowConfig(4, 4)) == RowConfig(16, 8)
        assert choose("sandwich", "any", OnGpu, RowConfig(4, 4)) == RowConfig(4, 4)
    with force_config("rms_norm", None):
        assert choose("rms_norm", "any", OnGpu, RowConfig(4, 4)) == RowConfig(4, 4)
    assert choose("rms_norm", "any", OnGpu, RowConfig(4, 4)) == RowConfig(8, 2)


def test_recording_nothing_gives_the_class_back_to_the_rule(table):
    for key in ("any", "other"):
        record("Some GPU", "rms_norm", key, RowConfig(8, 2), table)
    record("Some GPU", "rms_norm", "any", None, table)
    assert choose("rms_norm", "any", OnGpu, RowConfig(4, 4)) == RowConfig(4, 4)
    assert choose("rms_norm", "other", OnGpu, RowConfig(4, 4)) == RowConfig(8, 2)


def test_an_entry_of_other_fields_is_refused_by_name(table):
    table.write_text(json.dumps({"Some GPU": {"rms_norm": {"any": {"block": 64}}}}))
    with pytest.raises(ValueError, match=r"tuned\.json: rms_norm, any: expected fields .*'rows'.*found \['block'\]"):
        choose("rms_norm", "any", OnGpu, RowConfig(4, 4))


def test_a_damaged_table_is_refused_by_name(table):
    table.write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json: expected a JSON table"):
        choose("rms_norm", "any", OnGpu, RowConfig(4, 4))


def test_a_failed_write_leaves_the_table_as_it_was(table, monkeypatch):
    record("Some GPU", "rms_norm", "any", RowConfig(8, 2), table)
    before = table.read_text()

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(launch.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record("Some GPU", "rms_norm", "any", RowConfig(1, 1), table)
    assert table.read_text() == before
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("D", [1, 31, 384, 1024, 1025, 8192])
@pytest.mark.parametrize("N", [1, 2, 257, 4096])
def test_the_rule_keeps_tiles_within_what_registers_hold(N, D):
    config = row_config(N, D, elements_per_thread=32)
    elements = config.rows * launch.next_power_of_2(D)
    assert elements <= 8192
    assert elements <= 32 * config.num_warps * 32 or config.num_warps == 16


@pytest.mark.parametrize(("B", "N"), [(1, 1), (64, 257), (7, 100_000), (5000, 3), (0, 4), (3, 0)])
def test_a_split_covers_every_token(B, N):
    splits, tiles = SumConfig(4, 4, 1024).split(B, N)
    assert splits * tiles * 4 >= N
    assert B * splits <= max(2 * 1024, B)
    assert tiles >= 1


def test_rows_are_views_where_strides_allow():
    base = torch.zeros(2, 6, 4, 8)
    for x in (base, base[:, 1:5, 2], base[..., :6][:, 0]):
        rows = as_rows(x)
        assert rows.shape == (2, x[0, ..., 0].numel(), x.shape[-1])
        assert rows.data_ptr() == x.data_ptr()
    assert as_rows(base[0, 0], per_sample=False).shape == (1, 4, 8)
    assert as_rows(base.transpose(1, 3)).stride(-1) == 1


def test_an_assumed_architecture_ends_with_its_block():
    x = torch.empty(1, device="meta")
    with assume_arch(120):
        assert arch_of(x) == 120
    assert arch_of(x) == 80
    if DEVICE == "cuda":
        assert arch_of(torch.empty(1, device="cuda")) >= 80
