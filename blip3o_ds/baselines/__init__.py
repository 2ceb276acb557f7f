"""Models that need no training: the mean embedding, ridge regressions, and Gaussians around them."""
