"""The dataset format: shards, index, manifest, conversion, global order and loader."""
