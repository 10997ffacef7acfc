"""The one exception for a mistake of the user's.

Its message is a single line that names the value, the rule it breaks and the fix; the command line prints
it and exits with status 2. Everything else that is raised is a defect of spsim.
"""

from pydantic import ValidationError


class InputError(ValueError):
    """A value given by the user breaks a rule; the message says which value, which rule and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text as one line of what can be seen."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Text in which whatever moves a cursor, colours a terminal or is no character is written out, as `\\x1b`."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_problem(error: ValidationError, where: str) -> InputError:
    """The first complaint of a pydantic validation as one line, with the place in the file or call."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    value = problem.get("input")
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    text = str(cause) if cause is not None else problem["msg"]
    if problem["type"] == "extra_forbidden":
        text = "unknown key; remove it or correct its spelling"
    elif problem["type"] == "missing":
        text = "required, but missing; add it"
    elif isinstance(value, str | int | float | bool):
        text = f"{text}, got {value!r}"
    place = f"{where}: {path}: " if path else f"{where}: "
    return InputError(place + text)
