"""The fields that a word of bash becomes: variables, arrays and arithmetic of whole numbers put in, nothing run.

What a script does not say itself, the output of a command or a variable of the environment, stays as it is written,
and the field names it as what is not known.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from spsim.errors import InputError
from spsim.inputs.launch.shell.lexer import part_end

MAX_CHARACTERS = 2**20
"""Of all that one word becomes; a variable may double another many times."""


@dataclass(frozen=True, slots=True)
class Field:
    """A word as a command gets it."""

    text: str
    line: int
    unknown: str = ""
    """What of it the script does not say, such as `$TP`."""


Variables = Mapping[str, "Field | list[Field]"]
_PLAIN = re.compile(r"[^\\'\"$`]+")
_PLAIN_IN_QUOTES = re.compile(r"[^$`\\]*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_NAME = re.compile(r"[A-Za-z_]\w*")
_PARAMETER = re.compile(r"(#?)(\w+|[@*#?$!-])(\[[^\]]*\])?(.*)", re.DOTALL)
_INTEGERS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expansion:
    """Of words at one line of a script, with the variables as they are there."""

    variables: Variables
    line: int
    where: str

    def fields(self, word: str) -> list[Field]:
        """The fields of a word: none where all of it is an empty variable without quotes, several where it is split."""
        done: list[Field] = []
        current: list[Field] = []
        for part, quoted in self._parts(word):
            for number, piece in enumerate([part] if isinstance(part, Field) else part):
                words = [piece] if quoted else [*_split(piece)]
                if current and (number or (not quoted and piece.text[:1].isspace())):
                    done.append(self._joined(current))
                    current = []
                for word_number, found in enumerate(words):
                    if word_number:
                        done.append(self._joined(current))
                        current = []
                    current.append(found)
        return [*done, self._joined(current)] if current else done

    def text(self, word: str) -> Field:
        """A word as the value of a variable: not split, the elements of an array with blanks between them."""
        found: list[Field] = []
        for part, _ in self._parts(word):
            for number, piece in enumerate([part] if isinstance(part, Field) else part):
                found += [Field(" ", self.line), piece] if number else [piece]
        return self._joined(found)

    def _joined(self, fields: list[Field]) -> Field:
        if sum(len(field.text) for field in fields) > MAX_CHARACTERS:
            raise InputError(f"{self.where}:{self.line}: a word becomes over {MAX_CHARACTERS:,} characters; shorten it")
        unknown = next((field.unknown for field in fields if field.unknown), "")
        return Field("".join(field.text for field in fields), fields[0].line if fields else self.line, unknown)

    def _parts(self, word: str) -> Iterator[tuple[Field | list[Field], bool]]:
        """(text or fields, whether it is quoted) of a word."""
        place = 0
        while place < len(word):
            plain = _PLAIN.match(word, place)
            end = plain.end() if plain else part_end(word, place, f"{self.where}:{self.line}")
            part = word[place:end]
            if part[0] == "'":
                yield Field(part[1:-1], self.line), True
            elif part[0] == '"':
                yield from self._in_quotes(part[1:-1])
            elif part[0] == "\\":
                yield Field(part[1:].replace("\n", ""), self.line), True
            elif part[0] in "$`":
                value, end = self._value(word, place, end)
                yield value, False
            else:
                yield Field(part, self.line), True
            place = end

    def _in_quotes(self, text: str) -> Iterator[tuple[Field | list[Field], bool]]:
        yield Field("", self.line), True
        place = 0
        while place < len(text):
            if text[place] in "$`":
                value, place = self._value(text, place, part_end(text, place, f"{self.where}:{self.line}"))
                yield value, True
            elif text[place] == "\\" and text[place + 1 : place + 2] in ("\\", '"', "$", "`", "\n"):
                yield Field(text[place + 1].replace("\n", ""), self.line), True
                place += 2
            else:
                plain = _PLAIN_IN_QUOTES.match(text, place + 1)
                stop = plain.end() if plain else place + 1
                yield Field(text[place:stop], self.line), True
                place = stop

    def _value(self, text: str, place: int, end: int) -> tuple[Field | list[Field], int]:
        """What an expansion becomes, and where it ends."""
        part = text[place:end]
        if part.startswith("$((") and part.endswith("))"):
            return self._number(part), end
        if part.startswith("${"):
            return self._parameter(part, part[2:-1]), end
        if part.startswith("$(") or part[0] == "`":
            return self._unknown(part), end
        found = _VARIABLE.match(text, place + 1)
        if found is None:
            return Field("$", self.line), end
        return self._parameter("$" + found[0], found[0]), found.end()

    def _unknown(self, text: str) -> Field:
        return Field(text, self.line, text)

    def _parameter(self, written: str, inside: str) -> Field | list[Field]:
        found = _PARAMETER.fullmatch(inside)
        if found is None:
            return self._unknown(written)
        counted, name, index, rest = found.groups()
        value = self._element(name, index)
        if counted:
            return Field(str(len(value)), self.line) if isinstance(value, list) else self._unknown(written)
        form = re.match(r":?[-=+]", rest)
        if form is None:
            return self._unknown(written) if rest or value is None else value
        absent = value is None or (form[0][0] == ":" and _is_empty(value))
        otherwise = self.text(rest[form.end() :])
        if form[0][-1] == "+":
            return Field("", self.line) if absent else otherwise
        return otherwise if value is None or absent else value

    def _element(self, name: str, index: str | None) -> Field | list[Field] | None:
        """A variable, an element of an array, or all of them."""
        value = self.variables.get(name)
        if index is None:
            return value[0] if isinstance(value, list) and value else value
        if index in ("[@]", "[*]"):
            return [value] if isinstance(value, Field) else value
        number = index[1:-1]
        if isinstance(value, list) and number.isdecimal() and int(number) < len(value):
            return value[int(number)]
        return None

    def _number(self, written: str) -> Field:
        """Of `$((...))`, in whole numbers."""
        inside = self.text(re.sub(r"\$\{(\w+)\}", r"$\1", written[3:-2]))
        named = _NAME.sub(self._operand, inside.text)
        try:
            value = _integer(ast.parse(named.strip().replace("/", "//"), mode="eval").body)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            return self._unknown(written)
        return self._unknown(written) if inside.unknown else Field(str(value), self.line)

    def _operand(self, name: re.Match[str]) -> str:
        value = self._element(name[0], None)
        return value.text if isinstance(value, Field) and not value.unknown else name[0]


def _split(piece: Field) -> Iterator[Field]:
    """At blanks, as bash does without quotes; what is not known stays whole."""
    words = [piece.text] if piece.unknown else piece.text.split()
    return (replace(piece, text=word) for word in words)


def _is_empty(value: Field | list[Field]) -> bool:
    return not value if isinstance(value, list) else value.text == ""


def _integer(node: ast.expr) -> int:
    """A number of small operands; `ValueError` for all else."""
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**62:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_integer(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _INTEGERS:
        value = _INTEGERS[type(node.op)](_integer(node.left), _integer(node.right))
        if abs(value) < 2**62:
            return value
    raise ValueError("no whole number")
