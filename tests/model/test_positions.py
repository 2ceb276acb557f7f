"""Rotary positions against the definition, and the property that attention needs of them."""

import numpy as np
import pytest
import torch

from blip3o_ds.model.positions import RotaryTables, axis_pairs, grid_positions, rope_tables
from blip3o_kernels import qk_norm_rope


def test_patches_sit_on_the_grid_and_cls_on_the_t_axis():
    positions = grid_positions(3, has_cls=True)
    assert positions[0].tolist() == [1, 0, 0]
    assert positions[1:].tolist() == [[0, row, col] for row in range(3) for col in range(3)]
    assert grid_positions(3, has_cls=False).tolist() == positions[1:].tolist()


def test_pairs_are_split_over_the_axes():
    assert axis_pairs(64) == (8, 12, 12)
    for head_dim in range(2, 130, 2):
        t, row, col = axis_pairs(head_dim)
        assert t + row + col == head_dim // 2
        assert row == col >= 0 < t


def test_every_pair_turns_by_its_own_axis_frequency():
    cos, sin = rope_tables(4, True, 32, 100.0)
    counts = axis_pairs(32)
    for n, position in enumerate(grid_positions(4, True)):
        angles = [position[a] * 100.0 ** (-i / counts[a]) for a in range(3) for i in range(counts[a])]
        np.testing.assert_allclose(cos[n], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[n], np.sin(angles), atol=1e-6)


def test_attention_logits_depend_on_relative_position_alone():
    """The same q and k at every patch: the logit of two patches depends only on their offset in row and col."""
    grid, D = 5, 32
    cos, sin = rope_tables(grid, False, D, 50.0)
    q, k = torch.randn(2, D, generator=torch.Generator().manual_seed(0)).unbind()
    q, k = (x.expand(1, grid**2, 1, D) for x in (q, k))
    q, k = qk_norm_rope(q, k, torch.ones(D), torch.ones(D), cos, sin)
    logits = torch.einsum("nd,md->nm", q[0, :, 0], k[0, :, 0]).view(grid, grid, grid, grid)
    torch.testing.assert_close(logits[:-1, :-1, :-1, :-1], logits[1:, 1:, 1:, 1:], atol=1e-4, rtol=0)
    assert (logits[0, 0, 0, 1] - logits[0, 0, 1, 0]).abs() > 1e-3  # row and col are told apart
    assert (logits[0, 0, 0, 1] - logits[0, 1, 0, 0]).abs() > 1e-3  # and so are the two directions


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)])
def test_tables_stay_fp32_when_the_model_is_cast(change):
    tables = change(RotaryTables(3, False, 16, 100.0))
    for found, expected in zip(tables(), rope_tables(3, False, 16, 100.0), strict=True):
        assert torch.equal(found, expected)


def test_tables_of_a_model_built_without_memory_are_right_once_it_has_some():
    with torch.device("meta"):
        tables = RotaryTables(3, False, 16, 100.0)
    tables = tables.to("meta").to_empty(device="cpu")
    assert torch.equal(tables()[0], rope_tables(3, False, 16, 100.0)[0])
