"""The errors that a user can cause. Each message says what is wrong, where, and what to do."""


class MegacoreError(Exception):
    """A mistake of the user or work that failed; the command line prints it without a traceback.

    Attributes:
        exit_code: 2 for a mistake in the call, 1 for work that failed or a check that did not hold.
        rank: Rank that raised the error, in a group started by torchrun or srun; ``None`` if the error occurred on
            every rank alike, before the group existed.
    """

    exit_code = 2
    rank: int | None = None


class ConfigError(MegacoreError):
    """A model or run configuration that is contradictory, incomplete, or not supported."""


class PluginError(MegacoreError):
    """A model plugin that is missing, broken or ambiguous, or that returned a wrong result from a hook."""


class UnsupportedSourceError(MegacoreError):
    """A checkpoint format that the plugin does not read or write."""


class CheckpointError(MegacoreError):
    """A checkpoint directory that is missing, of another kind, or does not fit the request."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose bytes contradict its own header or manifest."""

    exit_code = 1


class FetchError(CheckpointError):
    """A published checkpoint that could not be downloaded."""

    exit_code = 1


class WeightMapError(MegacoreError):
    """A disagreement of weight map, model and source checkpoint about names or shapes."""


class LayoutError(MegacoreError):
    """A tensor or pipeline parallel size that the model cannot be cut for."""


class DataError(MegacoreError):
    """A dataset or text file that is missing, malformed, or does not fit the model."""


class OutputError(MegacoreError):
    """An output that exists or could not be written; nothing is left half written."""


class DiskFullError(OutputError):
    """Too little disk space for the output."""

    exit_code = 1


class TrainingError(MegacoreError):
    """A run that cannot continue, for example because its loss is no longer finite."""

    exit_code = 1


class GenerationError(MegacoreError):
    """A prompt or a setting from which no text can be generated."""


class VerificationError(MegacoreError):
    """A requested check that did not hold."""

    exit_code = 1


class WorkerError(MegacoreError):
    """A worker process that died."""

    exit_code = 1


class ReaderGoneError(MegacoreError):
    """The reader of the output closed the pipe, so that no work remains and no message can be delivered.

    The command line exits silently, with the code of a program that SIGPIPE ended.
    """

    exit_code = 141
