"""The one exception for what a user can mend: bad arguments, files and settings."""


class InputError(ValueError):
    """A setting, file or object that rhc was given cannot be used.

    Its message is one sentence that names the argument, its value and the mend; the command line
    prints it without a traceback and exits with status 2.
    """
