"""The one error a user's mistake ends in: a single line that says what is wrong, where, and what to do."""


class InputError(ValueError):
    """An input from outside (file, key, flag, prompt) is wrong; the message is one line that names it."""


class FormatError(InputError):
    """A file's bytes contradict its format."""


class ConfigError(InputError):
    """A configuration is incomplete, out of range, or contradicts the tensors it comes with."""


class ArgumentError(InputError, TypeError):
    """A public function was called with an unknown argument, or with an argument of the wrong type."""
