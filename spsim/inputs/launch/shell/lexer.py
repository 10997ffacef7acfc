"""The tokens of a bash script: words as they are written, quotes and all, and the operators between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from spsim.errors import InputError

_OPERATOR = re.compile(r"<<<|<<-|&>>|&&|\|\||;;|\|&|<<|>>|>&|<&|&>|>\||[;&|()<>]")
_BLANKS = " \t\r"
_ENDS_WORD = {*_BLANKS, "\n", *";&|()<>"}
_HEREDOC = ("<<", "<<-")


@dataclass(frozen=True, slots=True)
class Token:
    """A word as it is written, or an operator; a new line is one."""

    text: str
    line: int
    is_word: bool = True


def tokens(text: str, where: str, first_line: int = 1) -> Iterator[Token]:
    """The tokens of a script; `InputError` where a quote or bracket is not closed."""
    place, line, ends = 0, first_line, [""]
    ends.clear()
    while place < len(text):
        character = text[place]
        if character == "\\" and text[place + 1 : place + 2] == "\n":
            place, line = place + 2, line + 1
        elif character in _BLANKS:
            place += 1
        elif character == "#":
            place = _end_of_line(text, place)
        elif character == "\n":
            yield Token("\n", line, is_word=False)
            after = _behind_documents(text, place + 1, ends)
            ends = []
            line, place = line + text.count("\n", place, after), after
        elif found := _OPERATOR.match(text, place):
            yield Token(found[0], line, is_word=False)
            place = found.end()
            if found[0] in _HEREDOC:
                ends.append(_delimiter(text, place))
        else:
            end = word_end(text, place, f"{where}:{line}")
            if not (text[place:end].isdecimal() and text[end : end + 1] in ("<", ">")):  # the 2 of 2>
                yield Token(text[place:end], line)
            line, place = line + text.count("\n", place, end), end


def word_end(text: str, place: int, where: str) -> int:
    """Where the word that begins at a place ends."""
    while place < len(text) and text[place] not in _ENDS_WORD:
        place = part_end(text, place, where)
    return place


def part_end(text: str, place: int, where: str) -> int:
    """Where a quoted text, an expansion or a single character of a word ends."""
    character, following = text[place], text[place + 1 : place + 2]
    if character == "\\":
        return min(place + 2, len(text))
    if character == "'":
        return _closing(text, place + 1, "'", where)
    if character == "`":
        return _closing(text, place + 1, "`", where)
    if character == '"':
        return quoted_end(text, place + 1, where)
    if character == "$" and following == "(":
        return _bracketed(text, place + 1, "(", ")", where)
    if character == "$" and following == "{":
        return _bracketed(text, place + 1, "{", "}", where)
    return place + 1


def quoted_end(text: str, place: int, where: str) -> int:
    """Where a text in double quotes ends, behind the closing one."""
    while place < len(text) and text[place] != '"':
        place = place + 1 if text[place] == "'" else part_end(text, place, where)
    if place >= len(text):
        raise InputError(f'{where}: a quote " is not closed; close it')
    return place + 1


def _closing(text: str, place: int, mark: str, where: str) -> int:
    end = text.find(mark, place)
    if end < 0:
        raise InputError(f"{where}: a quote {mark} is not closed; close it")
    return end + 1


def _bracketed(text: str, place: int, opening: str, closing: str, where: str) -> int:
    depth = 0
    while place < len(text):
        depth += (text[place] == opening) - (text[place] == closing)
        if depth == 0:
            return place + 1
        place = place + 1 if text[place] == opening else part_end(text, place, where)
    raise InputError(f"{where}: a bracket {opening} is not closed; close it")


def _end_of_line(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _delimiter(text: str, place: int) -> str:
    """The word behind `<<`, without quotes."""
    return re.sub(r"[\"'\\]", "", text[place : _end_of_line(text, place)].strip().split(" ")[0].split(";")[0])


def _behind_documents(text: str, place: int, ends: list[str]) -> int:
    """Behind the lines of here-documents, each up to its delimiter."""
    for end in ends:
        while place < len(text):
            stop = _end_of_line(text, place)
            line, place = text[place:stop].strip(), stop + 1
            if line == end:
                break
    return min(place, len(text))
