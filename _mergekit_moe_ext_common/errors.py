"""The one error for what a user can fix."""

import click


class UserError(click.ClickException, ValueError):
    """What was wrong, where, and what would be right, in words for the person who wrote the command
    or the call.

    A command prints it without a traceback, as every `ClickException`; Python code catches a
    `ValueError`.
    """
