"""A dataset to a dataset with the same samples in another dtype, shard size or token layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.schema import StorageDType, TokenLayout
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import DataError
from blip3o_ds.progress import Progress


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
        for shard, size in enumerate(Progress("convert", len(dataset.shard_sizes), "shards").over(dataset.shard_sizes)):
            for index in range(size):
                key = dataset.key(shard, index)
                seen.add(key)
                if key not in done:
                    writer.write(key, dataset.read(shard, index).tensors, dataset.meta(shard, index))
        refuse_foreign(dst, done - seen)
    return {"source_dtype": dataset.spec.dtypes, **summary(dst, writer, len(done))}


def refuse_foreign(dst: str | Path, keys: set[str]) -> None:
    """Raise DataError if there are any `keys`, which are in `dst` and not in the source."""
    if keys:
        raise DataError(
            f"{dst}: holds {len(keys)} samples that are not in the source, such as {min(keys)!r}; it belongs to "
            "another conversion, give an empty folder"
        )


def summary(dst: str | Path, writer: DatasetWriter, found_done: int) -> dict[str, Any]:
    """What a conversion to `dst` returns: counts, the specification, and the cost of the stored dtype."""
    manifest = Manifest.load(dst)
    return {
        "samples": manifest.num_samples,
        "samples_found_done": found_done,
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        "spec": manifest.spec.to_dict(),
        "cost": writer.cost(),
    }
