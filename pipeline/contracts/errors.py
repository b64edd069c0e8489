"""The few exceptions that a job turns into exit code 1.

Every message says what is wrong, what was found, what was expected, where, and what to do next. Anything else that
escapes a stage is our own mistake and keeps its traceback.
"""

from __future__ import annotations

from pipeline.contracts.safety import printable, redact


class PipelineError(Exception):
    """Something outside our code is wrong; the message says what to do. Jobs print it and exit with 1.

    No message shows a secret or moves a terminal's cursor, whatever it was made of. explains_interrupt: it takes the
    place of an interrupt that we sent ourselves.
    """

    explains_interrupt = False

    def __init__(self, message: str) -> None:
        super().__init__(printable(redact(message)))


class SettingsError(PipelineError):
    """The settings file, or an override of it, cannot mean anything."""


class DataError(PipelineError):
    """The user's data, or a dataset of the run, is not what its contract says."""


class StorageError(PipelineError):
    """Storage refused: nothing there, no permission, no space, no answer."""


class ResourceError(PipelineError):
    """The machine lacks what a stage needs: a port, a program, a package, memory."""


class ConflictError(PipelineError):
    """Somebody else was quicker; the message says who, and what is so now."""
