"""The errors that a user can cause, each with a message that says what is wrong, where, and what to do."""


class MegacoreError(Exception):
    """A user's mistake, or work that could not be done; the command line prints it without a traceback.

    ``exit_code`` is 2 for a mistake in the call and 1 for work that failed or a check that did not hold.

    Attributes:
        rank: of the group that torchrun or srun has started, which one this happened to; ``None`` where it did before
            there was one, on each of them alike.
    """

    exit_code = 2
    rank: int | None = None


class ConfigError(MegacoreError):
    """A model or run configuration that is contradictory, incomplete, or not supported."""


class PluginError(MegacoreError):
    """A model plugin is missing, broken, contested, or answered a hook wrongly."""


class UnsupportedSourceError(MegacoreError):
    """A plugin was asked for a checkpoint format that it does not read or write."""


class CheckpointError(MegacoreError):
    """A checkpoint directory that is missing, of another kind, or does not fit the request."""


class CorruptCheckpointError(CheckpointError):
    """The bytes of a checkpoint are not what its own header or manifest says: work cannot go on."""

    exit_code = 1


class FetchError(CheckpointError):
    """A checkpoint could not be fetched from where it is published."""

    exit_code = 1


class WeightMapError(MegacoreError):
    """The weight map, the model and the source checkpoint disagree about names or shapes."""


class LayoutError(MegacoreError):
    """A tensor or pipeline parallel size that the model cannot be cut into."""


class DataError(MegacoreError):
    """A dataset or text file that is missing, malformed, or does not fit the model."""


class OutputError(MegacoreError):
    """The output exists, or could not be written; nothing was left half written."""


class DiskFullError(OutputError):
    """There is too little room for the output."""

    exit_code = 1


class TrainingError(MegacoreError):
    """A run that cannot go on: its numbers are no longer finite, for example."""

    exit_code = 1


class GenerationError(MegacoreError):
    """A prompt or a setting that no text can be generated from."""


class VerificationError(MegacoreError):
    """A check that was asked for did not hold."""

    exit_code = 1


class WorkerError(MegacoreError):
    """A process that was started for the work died."""

    exit_code = 1


class ReaderGoneError(MegacoreError):
    """Who read the output has left: there is nothing more to do, and nobody to tell of it.

    The command line ends without a word, and with the code that a shell gives to a program which SIGPIPE has ended.
    """

    exit_code = 141
