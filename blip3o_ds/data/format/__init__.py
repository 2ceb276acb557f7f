"""The format on disk: specification, tar, index, codec, writer, manifest."""
