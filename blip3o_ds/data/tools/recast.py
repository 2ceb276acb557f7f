"""A dataset to a dataset with the same samples in another dtype, shard size or token layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.schema import StorageDType, TokenLayout
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import DataError


def recast(
    src: str | Path,
    dst: str | Path,
    *,
    token_layout: TokenLayout | None = None,
    dtype: StorageDType = "bf16",
    samples_per_shard: int = 512,
) -> dict[str, Any]:
    """Write the samples of the dataset `src` (a folder or URL) to `dst` as `dtype`, or finish what was interrupted.

    Returns counts, the specification, and under `cost` what the new dtype did to each tensor (see
    `Distortion.to_dict`; samples found done are not measured again). Raises DataError that names the file.
    """
    dataset = EmbeddingDataset(src, token_layout=token_layout)
    if Path(dst).resolve() == Path(src).resolve():
        raise DataError(f"{dst}: source and destination are the same folder; give another destination")
    spec = dataset.spec.stored_as(dtype)
    extra = {**dataset.manifest.extra, "recast_from": dataset.manifest.spec.dtypes}
    with DatasetWriter(dst, spec, samples_per_shard, extra, resume=True) as writer:
        done = writer.done_keys()
        seen: set[str] = set()
        for shard, size in enumerate(tqdm(dataset.shard_sizes, desc="convert", unit="shard", disable=None)):
            for index in range(size):
                key = dataset.key(shard, index)
                seen.add(key)
                if key not in done:
                    writer.write(key, dataset.read(shard, index).tensors, dataset.meta(shard, index))
        if foreign := sorted(done - seen):
            raise DataError(
                f"{dst}: holds {len(foreign)} samples that are not in {src}, such as {foreign[0]!r}; it belongs to "
                "another conversion, give an empty folder"
            )
    manifest = Manifest.load(dst)
    return {
        "source_dtype": dataset.spec.dtypes,
        "samples": manifest.num_samples,
        "samples_found_done": len(done),
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        "spec": manifest.spec.to_dict(),
        "cost": writer.cost(),
    }
