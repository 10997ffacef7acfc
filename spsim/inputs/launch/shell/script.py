"""The commands of a bash script in order, as far as it says itself what they are.

Assignments, arrays, `if` with tests of texts and numbers, `&&` and `||`, and what `bash -c` and `eval` are given are
followed. Loops, functions, and branches whose test asks for more than the script says are passed over: what they would
change is then not known, and a note names their line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from spsim.errors import InputError
from spsim.inputs.launch.shell.expansion import Expansion, Field
from spsim.inputs.launch.shell.lexer import Token, tokens

MAX_DEPTH = 8
"""Of scripts given to `bash -c` inside one another."""
MAX_FIELDS = 100_000
"""Of all commands and arrays together."""

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARES = ("export", "declare", "local", "readonly", "typeset")
_SHELLS = ("bash", "sh", "zsh")
_CLOSES = {"if": "fi", "for": "done", "while": "done", "until": "done", "select": "done", "case": "esac"}
_REDIRECTIONS = (">", ">>", "<", "<<", "<<-", "<<<", ">&", "<&", "&>", "&>>", ">|")
_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b, "-ne": lambda a, b: a != b, "-lt": lambda a, b: a < b, "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b, "-ge": lambda a, b: a >= b,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """One simple command with its arguments."""

    fields: tuple[Field, ...]
    line: int


@dataclass
class Script:
    """What a script runs: read by `Script.of`."""

    where: str
    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    variables: dict[str, Field | list[Field]] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, text: str, where: str) -> Script:
        """Of the text of a file; `InputError` names the line where it is no bash."""
        script = cls(where)
        try:
            script.run(text, 1, 0)
        except RecursionError:
            raise InputError(f"{where}: is nested too deeply; give a plain script") from None
        return script

    def run(self, text: str, line: int, depth: int) -> None:
        """Follow a text that begins at a line."""
        _Run(self, [*tokens(text, self.where, line)], depth).block(())

    def grow(self, number: int) -> None:
        """Count fields; `InputError` where they are too many."""
        self.size += number
        if self.size > MAX_FIELDS:
            raise InputError(f"{self.where}: has over {MAX_FIELDS:,} words; give a shorter script")


class _Run:
    """Goes through the tokens of one text."""

    def __init__(self, script: Script, found: Sequence[Token], depth: int) -> None:
        self.script, self.tokens, self.depth, self.place = script, found, depth, 0

    def block(self, ends: tuple[str, ...], *, live: bool | None = True) -> None:
        """Statements up to one of some words; `live` says whether they are run, None where nobody knows."""
        before: bool | None = True
        joined = ""
        while self.place < len(self.tokens):
            token = self.tokens[self.place]
            if token.is_word and token.text in ends:
                return
            if token.is_word or token.text in ("(", *_REDIRECTIONS):
                runs = live if not joined else _also(live, before if joined == "&&" else _not(before))
                before = self._statement(token, runs, before)
                joined = ""
            else:
                joined = token.text if token.text in ("&&", "||") else joined if token.text == "\n" and joined else ""
                self.place += 1
        if ends:
            raise InputError(f"{self.script.where}: {' or '.join(ends)} is missing at the end of the script")

    # ------------------------------------------------------------ statements

    def _statement(self, token: Token, live: bool | None, before: bool | None) -> bool | None:
        """Whether it succeeds, None where nobody knows."""
        if token.text == "if" and token.is_word:
            self._if(live)
            return True
        if token.is_word and (token.text in _CLOSES or token.text == "function"):
            self._pass_over(token, live)
            return True
        if token.text == "{":
            self.place += 1
            self.block(("}",), live=live)
            self.place += 1
            return True
        if token.text == "(":
            self.place += 1
            return True
        following = [other.text for other in self.tokens[self.place + 1 : self.place + 3]]
        if following == ["(", ")"] and token.is_word and not token.text.endswith("="):
            self._pass_over(token, live)
            return True
        return self._command(live, before)

    def _if(self, live: bool | None) -> None:
        decided: bool | None = False
        undecided = 0
        while True:
            line = self.tokens[self.place].line
            self.place += 1
            holds = self._condition()
            here = _also(live, _also(_not(decided), holds))
            undecided = undecided or (line if live and here is None else 0)
            self._expect("then")
            self.block(("elif", "else", "fi"), live=here)
            decided = True if decided is True or holds is True else None if None in (decided, holds) else False
            if self._at("elif"):
                continue
            if self._at("else"):
                self.place += 1
                self.block(("fi",), live=_also(live, _not(decided)))
            self._expect("fi")
            break
        if undecided:
            self._note(undecided, "if: what it tests is not known; its branches are not read")

    def _condition(self) -> bool | None:
        """Of the commands up to `then`."""
        value: bool | None = True
        joined = ""
        while not self._at("then"):
            if self.place >= len(self.tokens):
                return None
            token = self.tokens[self.place]
            if token.is_word:
                start = self.place
                inverted = token.text == "!"
                self.place += inverted
                found = self._command(None, None, declare=False)
                found = _not(found) if inverted else found
                value = {"": found, "&&": _also(value, found), "||": _not(_also(_not(value), _not(found)))}[joined]
                self.place = max(self.place, start + 1)
                joined = ""
            else:
                if token.text in ("(", ")"):
                    value = None if token.text == "(" else value
                joined = token.text if token.text in ("&&", "||") else joined
                self.place += 1
        return value

    def _pass_over(self, token: Token, live: bool | None) -> None:
        """A loop, a choice or a function: what it assigns is not known behind it."""
        start, depth = self.place, 0
        closes = _CLOSES.get(token.text, "}")
        opens = "{" if closes == "}" else token.text
        while self.place < len(self.tokens):
            text = self.tokens[self.place].text if self.tokens[self.place].is_word else ""
            first = self.place == start or self.tokens[self.place - 1].text in (
                "\n",
                ";",
                "do",
                "then",
                "else",
                ")",
                "{",
            )
            depth += first and (text == opens or (closes == "done" and text in _CLOSES and _CLOSES[text] == "done"))
            depth -= first and text == closes
            self.place += 1
            if text == closes and depth == 0:
                break
        if live is not False:
            for passed in self.tokens[start : self.place]:
                self._forget(passed)
            self._note(token.line, f"{token.text}: loops, choices and functions are not read")

    def _forget(self, token: Token) -> None:
        if token.is_word and (found := _ASSIGNMENT.fullmatch(token.text)):
            self.script.variables[found[1]] = Field(f"${found[1]}", token.line, f"${found[1]}")

    # ------------------------------------------------------------ commands

    def _command(self, live: bool | None, before: bool | None, *, declare: bool = True) -> bool | None:
        """A simple command with its assignments; whether it succeeds."""
        fields: list[Field] = []
        line = self.tokens[self.place].line
        in_test = self.tokens[self.place].text == "[["
        while self.place < len(self.tokens):
            token = self.tokens[self.place]
            if not token.is_word and token.text in _REDIRECTIONS and not in_test:
                self.place += 2
            elif not token.is_word and not (in_test and token.text != "\n"):
                break
            elif token.is_word and declare and self._assigns(token, fields):
                self._assign(token, live)
            else:
                self.place += 1
                fields += self._fields(token) if token.is_word else [Field(token.text, token.line)]
                in_test = in_test and token.text != "]]"
        if live is False or not fields:
            return before if live is False else True
        name = fields[0].text
        if name in ("[", "[[", "test"):
            return _test([field for field in fields[1:] if field.text not in ("]", "]]")])
        if name in ("true", ":"):
            return True
        if live is None:
            return None
        self._ran(fields, line)
        return True

    def _ran(self, fields: list[Field], line: int) -> None:
        fields = [field for field in fields if field.text]
        self.script.grow(len(fields))
        script = _inner(fields)
        if script is None:
            self.script.commands.append(Command(tuple(fields), line))
        elif self.depth < MAX_DEPTH:
            self.script.run(script.text, script.line, self.depth + 1)
        else:
            raise InputError(f"{self.script.where}:{line}: runs {MAX_DEPTH} shells in one another; give a plain script")

    def _assigns(self, token: Token, fields: list[Field]) -> bool:
        leads = not fields or fields[0].text in _DECLARES
        return leads and _ASSIGNMENT.fullmatch(token.text) is not None

    def _assign(self, token: Token, live: bool | None) -> None:
        found = _ASSIGNMENT.fullmatch(token.text)
        assert found is not None
        name, more, text = found.groups()
        self.place += 1
        value: Field | list[Field]
        if not text and self.place < len(self.tokens) and self.tokens[self.place].text == "(":
            value = self._array()
        else:
            value = self._expansion(token).text(text)
        if live is None:
            value = Field(f"${name}", token.line, f"${name}")
        elif more:
            value = self._added(self.script.variables.get(name), value)
        if live is not False:
            self.script.grow(len(value) if isinstance(value, list) else 1)
            self.script.variables[name] = value

    def _added(self, old: Field | list[Field] | None, new: Field | list[Field]) -> Field | list[Field]:
        if isinstance(old, list) or isinstance(new, list):
            first = old if isinstance(old, list) else [old] if old else []
            return [*first, *(new if isinstance(new, list) else [new])]
        return new if old is None else Field(old.text + new.text, new.line, old.unknown or new.unknown)

    def _array(self) -> list[Field]:
        """The words between brackets, over several lines."""
        opened = self.tokens[self.place].line
        self.place += 1
        found: list[Field] = []
        while self.place < len(self.tokens):
            token = self.tokens[self.place]
            self.place += 1
            if token.text == ")" and not token.is_word:
                return found
            if token.is_word:
                found += self._fields(token)
        raise InputError(f"{self.script.where}:{opened}: an array is not closed; close it")

    def _fields(self, token: Token) -> list[Field]:
        return self._expansion(token).fields(token.text)

    def _expansion(self, token: Token) -> Expansion:
        return Expansion(self.script.variables, token.line, self.script.where)

    # ------------------------------------------------------------ tokens

    def _at(self, word: str) -> bool:
        return self.place < len(self.tokens) and self.tokens[self.place].text == word

    def _expect(self, word: str) -> None:
        while self.place < len(self.tokens) and not self.tokens[self.place].is_word:
            self.place += 1
        if not self._at(word):
            raise InputError(f"{self.script.where}: {word} is missing; end every if with then and fi")
        self.place += 1

    def _note(self, line: int, text: str) -> None:
        self.script.notes.append(f"{self.script.where}:{line}: {text}")


def _inner(fields: list[Field]) -> Field | None:
    """The script that a command is given as an argument, as in `srun bash -c "..."`."""
    for number, (shell, option) in enumerate(pairwise(fields)):
        if shell.text.rpartition("/")[2] in _SHELLS and re.fullmatch("-[a-z]*c", option.text):
            return fields[number + 2] if number + 2 < len(fields) else None
    if fields and fields[0].text == "eval":
        return Field(" ".join(field.text for field in fields[1:]), fields[0].line)
    return None


def _test(fields: list[Field]) -> bool | None:
    """What `[`, `[[` and `test` say of texts and numbers; None of all else."""
    texts = [field.text for field in fields]
    for word, joined in (("||", any), ("-o", any), ("&&", all), ("-a", all)):
        if word in texts:
            place = texts.index(word)
            values = {_test(fields[:place]), _test(fields[place + 1 :])}
            return joined(value is True for value in values) if None not in values else None
    if texts and texts[0] == "!":
        return _not(_test(fields[1:]))
    if any(field.unknown for field in fields):
        return None
    if len(texts) == 3 and texts[1] in ("=", "==", "!="):
        return (texts[0] == texts[2]) == (texts[1] != "!=")
    if len(texts) == 3 and texts[1] in _NUMBERS and all(re.fullmatch(r"-?\d{1,18}", texts[n]) for n in (0, 2)):
        return _NUMBERS[texts[1]](int(texts[0]), int(texts[2]))
    if texts and texts[0] in ("-z", "-n") and len(texts) <= 2:
        return ("".join(texts[1:]) == "") == (texts[0] == "-z")
    return None


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _also(first: bool | None, second: bool | None) -> bool | None:
    if first is False or second is False:
        return False
    return None if first is None or second is None else True
