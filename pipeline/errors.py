"""What can go wrong, sorted by what to do about it.

    PipelineError
    ├── ConfigError        the user's settings or input are wrong          -> exit code 2
    ├── RunRefusedError    this run must not start on this output          -> exit code 2
    ├── StorageFullError   the output has no room left                     -> exit code 1, resumable
    ├── StoppedError       somebody asked the run to stop                  -> exit code 4
    ├── TransientError     storage, preemption, a lost worker              -> retried with backoff
    ├── ExhaustedError     the model has no memory left, nor anything smaller to try -> a fresh actor
    ├── RevokedError       an attempt that is not wanted any more     -> nothing
    ├── TerminalError      this clip cannot be encoded or decoded          -> quarantined
    └── DatasetError       a dataset is incomplete, damaged or foreign     -> raised to the reader

Every class keeps its constructor arguments in ``args``, so that it survives pickling through Ray.
"""

from __future__ import annotations

import traceback


class PipelineError(Exception):
    """Base of every error that the pipeline raises on purpose."""


class ConfigError(PipelineError):
    """A setting, a command line or an input that cannot be used as given."""


class RunRefusedError(PipelineError):
    """The output belongs to another recipe, or another run is alive on it."""


class StorageFullError(PipelineError):
    """The disk or the bucket's quota is used up. Nothing can be committed; whoever makes room may resume."""


class StoppedError(PipelineError):
    """The run ended early because it was asked to; the same command resumes."""


class TransientError(PipelineError):
    """A fault of the surroundings. Trying again may help; no clip is to blame."""


class ExhaustedError(PipelineError):
    """The model needs more memory than there is, whatever was tried. A fresh actor may have more."""


class RevokedError(PipelineError):
    """An attempt at a shard that was called back before it began."""


class TerminalError(PipelineError):
    """This one clip cannot be encoded or decoded, however often it is tried.

    Args:
        stage: where it was found: ``probe``, ``plan``, ``fetch``, ``read``, ``decode``, ``encode`` or ``write``.
        reason: a short code to count by, such as ``not_a_video``.
        detail: one sentence for a person: what happened, what was expected, what to do.
    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        super().__init__(stage, reason, detail)
        self.stage = stage
        self.reason = reason
        self.detail = detail

    @classmethod
    def unexpected(cls, stage: str, error: BaseException) -> TerminalError:
        """Blames a clip for an error that nobody foresaw; keeps the end of its traceback."""
        trace = "".join(traceback.format_exception(error)[-4:])
        return cls(stage, "unexpected", f"{type(error).__name__}: {error}\n{trace}")

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}: {self.detail}"


class DatasetError(PipelineError):
    """A latent dataset that is incomplete, damaged, or not what was asked for."""


ENDS_THE_RUN = (ConfigError, StorageFullError)
"""What no other worker and no later attempt would meet with more luck: whoever meets it passes it on."""
