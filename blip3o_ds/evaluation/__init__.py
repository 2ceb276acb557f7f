"""Metrics on generated embeddings, beside baselines that need no training."""
