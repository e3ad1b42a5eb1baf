"""What this program says in a terminal. Much of it is others' text (documents, names in files, messages about them),
and a terminal obeys control characters: what is said here has none but line ends and tabs."""

import re
import sys
import traceback
from types import TracebackType

# C0 and C1 but \t and \n, DEL, what turns the direction of text or ends a line, and halves of characters, which cannot
# be written
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters as Python spells them: ESC as `\\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: object, error: bool = False) -> None:
    """A line on stdout; error: on stderr."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, flush=True)


def counted(count: int, noun: str) -> str:
    """ "1 shard", "1,000 shards": for nouns whose plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: the usual traceback, printable."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)
