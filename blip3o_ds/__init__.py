"""blip3o_ds: train diffusion transformers that generate CLIP patch embeddings from EVA-CLIP ones by rectified flow."""

__version__ = "0.1.0"
