"""The one exception for what a user can cause and repair."""


class ConfigError(ValueError):
    """A setting, path or file that cannot work. The command line prints the message without a traceback.

    The message says what is wrong, the value received, what is allowed, and which key to change.
    """
