"""Images to patch embeddings, and from there to shards."""
