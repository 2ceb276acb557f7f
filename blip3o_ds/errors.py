"""The errors that this project raises on purpose.

Each message names the file, key or field, what was expected, what was found, and how to mend it; the command line
prints it as one line, without a traceback.
"""

from __future__ import annotations


class Blip3oError(Exception):
    """Base of every error raised on purpose; the command line ends with exit status 1."""


class ConfigError(Blip3oError):
    """A setting is unknown, of the wrong type, or impossible together with another one; exit status 2."""


class DataError(Blip3oError):
    """A dataset, shard, index or sample is not what the format says."""


class EncoderError(Blip3oError):
    """An encoder is unknown, its weights are missing, or it gave embeddings of another shape."""


class CheckpointError(Blip3oError):
    """A checkpoint or an export is missing, incomplete or belongs to another model."""


class TrainingError(Blip3oError):
    """Training cannot go on: a non-finite loss or gradient, or a rank that disagrees with the others."""
