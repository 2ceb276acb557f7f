"""What another storage dtype costs: how much variance of CLIP a ridge regression from EVA explains, before and after.

Relative error and cosine of the tokens need no fit and are measured during writing (`data/format/distortion.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blip3o_ds.baselines import fit_baselines
from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset

RIDGE_SAMPLES = 64  # about 16,000 tokens, four times the channels of EVA-CLIP-8B


def ridge_cost(
    src: str | Path, dst: str | Path, token_layout: TokenLayout | None = None, max_samples: int = RIDGE_SAMPLES
) -> dict[str, Any]:
    """Held-out R2 of the ridge fitted to each of two datasets of the same samples: `r2_source`, `r2_stored`.

    The fits use `max_samples` spread evenly over the datasets; R2 is None for fewer than ten. At the width of
    EVA-CLIP-8B a fit takes minutes on a few cores, seconds on a GPU.

    Raises:
        DataError: a dataset cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = [EmbeddingDataset(path, token_layout=token_layout) for path in (src, dst)]
    fits = [fit_baselines(dataset, Normalizer("minimal"), max_samples, device) for dataset in datasets]
    return {
        "samples": fits[0].num_samples,
        "r2_source": fits[0].heldout_r2,
        "r2_stored": fits[1].heldout_r2,
    }
