"""Errors in the user's input; each message is one line that states what is wrong, where, and what to do."""


class InputError(ValueError):
    """A user input (file, key, flag, prompt) is wrong; the one-line message names it."""


class FormatError(InputError):
    """The contents of a file violate its format."""


class ConfigError(InputError):
    """A configuration is incomplete, out of range, or inconsistent with the model's tensors."""


class ArgumentError(InputError, TypeError):
    """A public function was called with an unknown argument, or with an argument of the wrong type."""
