"""The one exception for a mistake of the user's.

Its message is a single line that names the value, the rule it breaks and the fix; the command line prints
it and exits with status 2. Everything else that is raised is a defect of spsim.
"""

from pydantic import ValidationError


class InputError(ValueError):
    """A value given by the user breaks a rule; the message says which value, which rule and how to fix it."""


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
    return InputError(" ".join((place + text).split()))
