"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in settings, data or a checkpoint, told in one line that names it and the remedy."""
