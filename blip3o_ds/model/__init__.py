"""The diffusion transformer, with nothing of training in it."""
