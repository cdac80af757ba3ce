"""Exceptions that a person can act on: bad arguments, files and settings; a run that diverged; a
disk that failed."""


class InputError(ValueError):
    """A setting, file or object that rhc was given cannot be used.

    Its message is one sentence that names the argument, its value and the mend; the command line
    prints it without a traceback and exits with status 2.
    """


class DivergedError(RuntimeError):
    """No lr within its bounds makes the next window finite; the last checkpoint is intact."""


class StorageError(RuntimeError):
    """A run went on to its end although the disk failed, and something of it is not saved.

    Its message is one sentence; the command line prints it and exits with status 3. result: what
    the run ended with, as `Runner.fit` would have returned it; None where it did not end.
    """

    result: object = None


class RunWarning(UserWarning):
    """Nothing failed, but a run is not what the caller may take it for. The message says why."""
