"""What a mistake in the user's input raises."""


class UserError(RuntimeError):
    """A mistake in the input: shown as one line, without a traceback."""

    def __str__(self):
        # A DataLoader worker's exception comes back as one string with the worker's traceback in
        # it; the line after the class name is the message.
        text = super().__str__()
        marker = f'{type(self).__name__}: '
        if text.startswith('Caught ') and marker in text:
            text = text.rsplit(marker, 1)[1]
        return text.strip()
