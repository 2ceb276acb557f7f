"""The cost of a stored dtype, against float64 by the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blip3o_ds.data.format.codec import Distortion


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_errors_and_cosines_are_the_formulas_in_float64(magnitude):
    generator = torch.Generator().manual_seed(0)
    given = magnitude * torch.randn(40, 16, generator=generator)
    stored = given * (1 + 0.1 * torch.randn(40, 16, generator=generator))
    distortion = Distortion()
    for rows in (slice(0, 7), slice(7, 40)):
        distortion.add(given[rows], stored[rows])

    x, y = given.double().numpy(), stored.double().numpy()
    norm = np.linalg.norm
    errors = norm(x - y, axis=1) / norm(x, axis=1)
    cosines = (x * y).sum(1) / (norm(x, axis=1) * norm(y, axis=1))
    expected = {
        "tokens": 40,
        "relative_error": errors.mean(),
        "relative_error_max": errors.max(),
        "cosine": cosines.mean(),
        "cosine_min": cosines.min(),
    }
    assert distortion.to_dict() == pytest.approx(expected, rel=1e-6)


def test_tokens_that_come_back_as_they_were_cost_nothing():
    distortion = Distortion()
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    distortion.add(values, values.clone())
    distortion.add(torch.zeros(1, 8), torch.zeros(1, 8).bfloat16())
    expected = {"tokens": 4, "relative_error": 0.0, "relative_error_max": 0.0, "cosine": 1.0, "cosine_min": 1.0}
    assert distortion.to_dict() == expected


def test_without_tokens_there_is_no_cost_to_tell():
    assert Distortion().to_dict()["relative_error"] is None
