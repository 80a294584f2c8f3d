"""The exceptions that end a script with one line instead of a traceback; see script.run."""


class InputError(Exception):
    """A mistake in what the user gave us.

    The message is one line that names the file, the line number where there is one, and the
    remedy, e.g. ``data/e2e/train.txt:17: no '||' between ...; write 'meaning||text'``.
    """


class Interrupted(KeyboardInterrupt):
    """The user stopped a script after it saved its state; the message says how to continue."""
