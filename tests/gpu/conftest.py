"""These tests need a CUDA device; elsewhere each is skipped and says so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; scripts/gpu_check.sh runs these there")
