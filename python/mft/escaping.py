"""Show text of others: characters that move a cursor, colour or reorder a line become escapes like \\x1b."""

import re

# C0, DEL, C1, separators of lines, changes of the direction of text, and halves of surrogate pairs, which no terminal
# can print. Invisible characters that writing needs, such as no-break spaces and the joiners in emoji, stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """Return text for a terminal, with its control characters escaped except for line ends and tabs."""
    return _CONTROLS.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """Return text with every character escaped that is not printable by itself, as in a repr without its quotes."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
