"""Inputs of each kind that users write, damaged: values of wrong kinds, signs, sizes and units, keys that are missing,
misspelt or new, lines that are lost or doubled, and characters that no one sees.
"""

import math
from copy import deepcopy

from hypothesis import strategies as st

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.presets import PRESETS
from spsim.inputs.workload import Workload

CHARACTERS = st.sampled_from("a8=,.;:[]{}\"'#$%\\/ \t\n\r\0\x1b\x7f\x85\u2028\u202eéẞ∞𝟖\ud800")
TEXTS = st.one_of(
    st.sampled_from(["", " ", "nan", "-inf", "8", "1e9", "true", "null", "$x^$", "[/red]", "%s{}", "../x", "x" * 300]),
    st.text(CHARACTERS, max_size=12),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 8, 2.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 10**30, math.nan, math.inf, -math.inf]),
    st.integers(-(2**20), 2**70),
    st.floats(),
)
VALUES = st.one_of(
    NUMBERS,
    TEXTS,
    st.booleans(),
    st.lists(st.one_of(NUMBERS, TEXTS), max_size=3),
    st.dictionaries(TEXTS, NUMBERS, max_size=2),
)
FACTORS = st.sampled_from([-1, 0, 0.1, 0.5, 2, 10, 1e-3, 1e3, 1e-6, 1e6, 1e9, 1.048576])
"""Signs, and units that are taken for one another."""


def is_number(value):
    """Whether a value can be scaled."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def places(document):
    """(table or list, key) of everything in a document, the outer before the inner."""
    for key in list(document) if isinstance(document, dict) else range(len(document)):
        yield document, key
        if isinstance(document[key], dict | list):
            yield from places(document[key])


def numbers(document):
    """Where numbers stand among the places of a document; in rows of texts, those that can be read as one."""
    found = list(enumerate(places(document)))
    if isinstance(document, list):
        return [number for number, (owner, key) in found if scaled_text(owner[key], 2) != owner[key]]
    return [number for number, (owner, key) in found if is_number(owner[key])]


def scaled(document, number, factor):
    """A document with one number scaled, a whole one to a whole one."""
    changed = deepcopy(document)
    owner, key = list(places(changed))[number]
    if isinstance(document, list):
        owner[key] = scaled_text(owner[key], factor)
    else:
        owner[key] = whole(owner[key] * factor, factor) if isinstance(owner[key], int) else owner[key] * factor
    return changed


def whole(product, factor):
    """A whole number for a scaled one, another than before."""
    return math.ceil(product) if factor > 1 else math.floor(product)


@st.composite
def damaged(draw, document, values=VALUES):
    """A document with one to three changes."""
    changed = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if changed:
            _change(draw, *_place(draw, changed), values)
    return changed


def _place(draw, document):
    """A table or list in a document and a key of it; what stands in a long list is no likelier than the rest."""
    key = draw(st.sampled_from(list(document) if isinstance(document, dict) else range(len(document))))
    inner = document[key]
    if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
        return _place(draw, inner)
    return document, key


def _change(draw, owner, key, values):
    """Change one value of a table or list, or take it away, or put one beside it."""
    kinds = ["value", "without", "beside", "doubled"] + ["scaled"] * 4 * is_number(owner[key])
    match draw(st.sampled_from(kinds)):
        case "value":
            owner[key] = draw(values)
        case "scaled":
            scaled = owner[key] * draw(FACTORS)
            owner[key] = int(scaled) if isinstance(owner[key], int) and math.isfinite(scaled) else scaled
        case "without":
            del owner[key]
        case "beside" if isinstance(owner, dict):
            owner[draw(TEXTS)] = draw(values)
        case "beside":
            owner.append(draw(values))
        case "doubled" if isinstance(owner, dict):
            owner[key + draw(st.sampled_from(["s", "_", "x", "\x1b"]))] = deepcopy(owner[key])
        case "doubled":
            owner.insert(key, deepcopy(owner[key]))


@st.composite
def damaged_text(draw, text):
    """A text of which lines are lost, doubled or exchanged, characters added, or the end is missing."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, max(len(lines) - 1, 0))) for _ in range(2))
        if not lines:
            break
        match draw(st.sampled_from(["lost", "doubled", "exchanged", "added", "replaced", "cut"])):
            case "lost":
                del lines[at]
            case "doubled":
                lines.insert(at, lines[at])
            case "exchanged":
                lines[at], lines[other] = lines[other], lines[at]
            case "added":
                column = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:column] + draw(TEXTS) + lines[at][column:]
            case "replaced":
                column = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:column] + draw(CHARACTERS) + lines[at][column + 1 :]
            case "cut":
                del lines[at + 1 :]
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
    return "".join(lines)


@st.composite
def damaged_lines(draw, text):
    """A text of which lines are lost, doubled, exchanged, joined, cut short or between lines of anything."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match draw(st.sampled_from(["lost", "doubled", "exchanged", "joined", "cut", "strange"])):
            case "lost" if len(lines) > 1:
                del lines[at]
            case "doubled":
                lines.insert(at, lines[other])
            case "exchanged":
                lines[at], lines[other] = lines[other], lines[at]
            case "joined":
                lines[at] = lines[at].rstrip("\n")
            case "cut":
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))] + draw(st.sampled_from(["", "\n"]))
            case "strange":
                lines.insert(at, draw(st.one_of(TEXTS, VALUES.map(repr))) + "\n")
    return "".join(lines)


@st.composite
def damaged_table(draw, table):
    """Rows of texts with one to three cells changed, or a row lost, doubled, longer or shorter."""
    rows = deepcopy(table)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(rows) - 1))
        column = draw(st.integers(0, max(len(rows[at]) - 1, 0)))
        match draw(st.sampled_from(["cell", "scaled", "lost", "doubled", "longer", "shorter"])):
            case "cell" if rows[at]:
                rows[at][column] = str(draw(st.one_of(NUMBERS, TEXTS)))
            case "scaled" if rows[at]:
                rows[at][column] = scaled_text(rows[at][column], draw(FACTORS))
            case "lost" if len(rows) > 1:
                del rows[at]
            case "doubled":
                rows.insert(at, list(rows[at]))
            case "longer":
                rows[at].append(draw(TEXTS))
            case "shorter":
                del rows[at][column:]
    return rows


def scaled_text(text, factor):
    """A number that stands as a text, scaled; anything else as it is."""
    try:
        product = float(text) * factor
    except (TypeError, ValueError):
        return text
    return str(whole(product, factor)) if text.isdecimal() and math.isfinite(product) else repr(product)


# ------------------------------------------------------------ words of the command line

DEGREES = st.sampled_from(["1", "2", "4", "8", "16", "3", "64"])
WORDS = st.one_of(
    DEGREES,
    st.sampled_from(["true", "False", "p2p", "all_gather", "contiguous", "selective", "full", "flash", "a2a", "64K"]),
    TEXTS,
    NUMBERS.map(str),
)
PLAN_KEYS = [*Plan.model_fields, "cp", "sp", "TP", "cp_comm_type", "context_parallel_size", "recompute_granularity"]
OPTIONS = st.one_of(
    st.builds("{}={}".format, st.sampled_from(["tp", "ulysses", "ring", "cp"]), DEGREES),
    st.builds("{}={}".format, st.sampled_from(PLAN_KEYS), WORDS),
    st.sampled_from(["sequence_parallel", "keep_gathered", "TP8+SP", "Ulysses 2 × Ring 4", "ring 2", "single GPU"]),
    TEXTS,
)
PLANS = st.lists(OPTIONS, max_size=4).map(",".join)
SETTINGS = [
    *(f"{name}.{key}" for name, kind in (("model", Model), ("plan", Plan), ("workload", Workload))
      for key in kind.model_fields),
    "model.preset", "hardware", "model", "plan", "workload", "nodes", "hardware.name",
]  # fmt: skip
CHANGES = st.one_of(st.builds("{}={}".format, st.sampled_from(SETTINGS), WORDS), TEXTS)
ARGUMENTS = st.one_of(
    st.tuples(st.sampled_from(["--seq-len", "--micro-batch", "--global-batch", "--nodes"]), WORDS),
    st.tuples(st.sampled_from(["--precision", "--phase", "--hardware", "--model"]), WORDS),
    st.tuples(st.sampled_from(["--model"]), st.sampled_from(sorted(PRESETS))),
    st.tuples(st.just("--set"), CHANGES),
    st.tuples(st.just("--plan"), PLANS),
    st.tuples(TEXTS),
)
