"""The words of a command in a shell script, without running anything: variables and arrays of the script are put in,
also those that its caller gives. Megatron-LM's examples are such scripts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_VARIABLE = re.compile(r"\$(?:\{(\w+|@|\*)(?:\[[@*]\])?(?::?-([^}]*))?\}|(\w)(?<=\d)|([A-Za-z_]\w*)|(@))")
_SPACE = " \t"
_ENDS = "\n;&|<>"
# words before a command that are none
_KEYWORDS = ("if", "then", "else", "elif", "do", "while", "for", "case", "{", "}", "!", "export", "local", "readonly")
_BRANCHES = ("if", "for", "while", "case")


@dataclass
class ShellScript:
    """What a script says. A variable that nobody sets stays in the words as it is written, `$NAME`."""

    text: str
    variables: dict[str, list[str]]
    """An array is a list of words, all else a list of one."""
    commands: list[list[str]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    """Keywords by which the shell would leave something out or do it again; here all is read once, in order."""
    _at: int = 0

    def _peek(self, ahead: int = 0) -> str:
        return self.text[self._at + ahead : self._at + ahead + 1]

    def read(self) -> None:
        words: list[str] = []
        while self._at < len(self.text):
            character = self._peek()
            if character in _SPACE:
                self._at += 1
            elif character == "#":
                self._skip_line()
            elif character in _ENDS:
                self._at += 1
                self._end_command(words)
                words = []
            elif character in "()":
                self._at += 1
            else:
                self._read_in_command(words)
        self._end_command(words)

    def _read_in_command(self, words: list[str]) -> None:
        found = _ASSIGNMENT.match(self.text, self._at)
        if found is None or any(word not in _KEYWORDS for word in words):
            words += self._word()
            return
        self._at = found.end()
        name, before = found[1], self.variables.get(found[1], []) if found[2] else []
        if self._peek() == "(":
            self._at += 1
            self.variables[name] = [*before, *self._array()]
            return
        value = " ".join(self._word()) if self._peek() not in (*_SPACE, *_ENDS, "") else ""
        self.variables[name] = [*before[:-1], (before[-1] if before else "") + value]

    def _end_command(self, words: list[str]) -> None:
        while words and words[0] in _KEYWORDS:
            keyword = words.pop(0)
            if keyword in _BRANCHES and keyword not in self.branches:
                self.branches.append(keyword)
        if words:
            self.commands.append(words)

    def _skip_line(self) -> None:
        end = self.text.find("\n", self._at)
        self._at = len(self.text) if end < 0 else end

    def _array(self) -> list[str]:
        words: list[str] = []
        while self._at < len(self.text) and self._peek() != ")":
            if self._peek() in _SPACE + _ENDS:
                self._at += 1
            elif self._peek() == "#":
                self._skip_line()
            else:
                words += self._word(ends=")")
        self._at += 1
        return words

    def _word(self, ends: str = "") -> list[str]:
        """The words that one word of the script becomes: none or several where a variable holds so many."""
        out: list[str] = []
        current: str | None = None
        while self._at < len(self.text):
            character = self._peek()
            if character in _SPACE + _ENDS or character in (ends or "()"):
                break
            if character == "'":
                current = (current or "") + self._until("'")
            elif character == '"':
                several = self._quoted()
                current = (current or "") + several[0] if several else current
                for word in several[1:]:
                    out.append(current or "")
                    current = word
            elif character == "\\":
                self._at += 2
                current = (current or "") + self.text[self._at - 1 : self._at]
            elif character in "$`":
                split = [part.strip("'\"") for value in self._expanded() for part in value.split()]
                for number, word in enumerate(split):
                    if number:
                        out.append(current or "")
                        current = None
                    current = (current or "") + word
            else:
                self._at += 1
                current = (current or "") + character
        return out if current is None else [*out, current]

    def _until(self, quote: str) -> str:
        end = self.text.find(quote, self._at + 1)
        end = len(self.text) if end < 0 else end
        part, self._at = self.text[self._at + 1 : end], end + 1
        return part

    def _quoted(self) -> list[str]:
        """What stands between double quotes: one word, or those of `"${ARRAY[@]}"`."""
        words = [""]
        self._at += 1
        while self._at < len(self.text) and self._peek() != '"':
            if self._peek() == "\\" and self._peek(1) in ('"', "\\", "$", "`"):
                words[-1] += self._peek(1)
                self._at += 2
            elif self._peek() in ("$", "`"):
                several = self._expanded()
                words[-1] += several[0] if several else ""
                words += several[1:]
            else:
                words[-1] += self._peek()
                self._at += 1
        self._at += 1
        return words

    def _expanded(self) -> list[str]:
        """The values of the variable that stands here; its own text where it has none or is no plain variable."""
        if self._peek() == "`" or self.text.startswith("$(", self._at):
            return [self._command_text()]
        found = _VARIABLE.match(self.text, self._at)
        if found is None:
            end = self._at + 1
            if self._peek(1) == "{":  # where it is never closed, the rest of the text
                end = self.text.find("}", self._at) + 1 or len(self.text)
            text, self._at = self.text[self._at : end], end
            return [text]
        self._at = found.end()
        name = next(part for part in (found[1], found[3], found[4], found[5]) if part is not None)
        values = self.variables.get(name)
        if found[2] is not None and (not values or values == [""]):
            return [_plain(found[2])]
        return [found[0]] if values is None else values

    def _command_text(self) -> str:
        """`$(...)` as it is written: no command is run."""
        start, depth = self._at, 0
        if self._peek() == "`":
            return f"`{self._until('`')}`"
        while self._at < len(self.text):
            depth += {"(": 1, ")": -1}.get(self._peek(), 0)
            self._at += 1
            if depth == 0 and self._at > start + 1:
                break
        return self.text[start : self._at]


def _plain(default: str) -> str:
    return default.strip("'\"")


def read_script(text: str, arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> ShellScript:
    """The commands of `text`, with `arguments` for $1, $2, ... and `variables` for what the environment would say."""
    known = {name: [value] for name, value in (variables or {}).items()}
    known |= {str(number): [value] for number, value in enumerate(arguments, 1)}
    known |= {"@": [*arguments], "*": [*arguments]}
    script = ShellScript(re.sub(r"\\[ \t]*\r?\n", "", _without_comment_lines(text)), known)
    script.read()
    return script


def _without_comment_lines(text: str) -> str:
    """A comment among the continued lines of a command would end it."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
