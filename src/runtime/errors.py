"""The exceptions that end a script with one line instead of a traceback; see script.run."""


LONGEST = 2000  # characters of a line


def one_line(text: str, keep: str = "") -> str:
    """``text`` as one line of printable characters; others, but those in ``keep``, become '?'.

    Text from files and file names may hold line breaks, a terminal's control sequences and
    surrogates, which cannot be printed. If it is longer than LONGEST, its middle is left out.
    """
    half = LONGEST // 2 - 20  # leaves room for the note
    if len(text) > LONGEST:
        text = f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)


class InputError(Exception):
    """A mistake in what the user gave us.

    The message, see :func:`one_line`, names the file, the line number where there is one, and the
    remedy, e.g. ``data/e2e/train.txt:17: no '||' between ...; write 'meaning||text'``.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Interrupted(KeyboardInterrupt):
    """The user stopped a script after it saved its state; the message says how to continue."""
