"""Frozen image encoders, and the extraction of their patch embeddings into a dataset."""
