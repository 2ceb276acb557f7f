"""The errors that this project raises on purpose.

Each message names the file, key or field, what was expected, what was found, and how to fix it; the command line
prints it as one line, without a traceback.
"""


class Blip3oError(Exception):
    """Base class of these errors; the command line exits with status 1."""


class ConfigError(Blip3oError):
    """A setting is unknown, of the wrong type, or contradicts another one; exit status 2."""


class DataError(Blip3oError):
    """A dataset, shard, index or sample does not follow the format."""


class EncoderError(Blip3oError):
    """An encoder is unknown, its weights are missing, or it gave embeddings of another shape."""


class CheckpointError(Blip3oError):
    """A checkpoint or an export is missing, incomplete, or belongs to another model."""


class TrainingError(Blip3oError):
    """Training cannot continue: a loss or gradient is not finite, or a rank disagrees with the others."""
