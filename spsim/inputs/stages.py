"""Which layers, and whether embedding or loss, each chunk of each pipeline stage holds.

Chunks are numbered along the way of an activation. Where `pp_layout` does not say what they hold:

- Layers that pp x virtual_pp divides are spread evenly.
- Where it divides layers + 2, embedding and loss each take one layer's slot, as Megatron-LM's
  `account_for_embedding_in_pipeline_split` and `account_for_loss_in_pipeline_split` have it.
- Otherwise the first chunks have one layer more than the last, as torchtitan hands out what is left over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from spsim.errors import InputError
from spsim.inputs.schedules import V_SHAPED

if TYPE_CHECKING:
    from spsim.inputs.model import Model
    from spsim.inputs.plan import Plan

MAX_PARTS = 2**16
"""Of a layout whose repetitions are written out."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stage runs of the model between two messages; the final norm goes with the loss."""

    layers: range
    """Numbers of its layers in the model, from 0; may be empty beside embedding or loss. Multi-token prediction is
    beside the loss.
    """
    embedding: bool
    loss: bool


def chunks_of(model: Model, plan: Plan) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of each stage, in the order in which an activation comes through them.

    `InputError` where there are more chunks than model, or where `pp_layout` has other chunks or layers.
    """
    chunks = all_chunks(model, plan)
    stages: list[list[Chunk]] = [[] for _ in range(plan.pp)]
    for number, chunk in enumerate(chunks):
        stages[stage_of(plan, number)].append(chunk)
    return tuple(map(tuple, stages))


def stage_of(plan: Plan, chunk: int) -> int:
    """The stage that holds a chunk: round and round, or there and back for schedules of a V."""
    turn, place = divmod(chunk, plan.pp)
    return plan.pp - 1 - place if turn % 2 and plan.pp_schedule in V_SHAPED else place


def all_chunks(model: Model, plan: Plan) -> tuple[Chunk, ...]:
    """The pp x virtual_pp chunks in the order in which an activation comes through them; errors as `chunks_of`."""
    if plan.pp_layout is None:
        counts = spread(model.layers, plan.pp * plan.virtual_pp)
    else:
        counts = _laid_out(plan.pp_layout, model, plan)
    ends = accumulate(counts, initial=0)
    last = len(counts) - 1
    return tuple(
        Chunk(range(start, stop), embedding=number == 0, loss=number == last)
        for number, (start, stop) in enumerate(pairwise(ends))
    )


def spread(layers: int, chunks: int) -> list[int]:
    """Layers of each chunk where no layout says it."""
    if chunks > layers + 2:
        raise InputError(
            f"plan: pp x virtual_pp = {chunks} chunks are more than layers + 2 = {layers + 2}, of which embedding and "
            f"loss are one each; use at most {layers + 2}"
        )
    if layers % chunks and (layers + 2) % chunks == 0:
        counts = [(layers + 2) // chunks] * chunks
        counts[0] -= 1
        counts[-1] -= 1
        return counts
    each, more = divmod(layers, chunks)
    return [each + (number < more) for number in range(chunks)]


# ------------------------------------------------------------ layouts in text


def layout_text(counts: Sequence[int], predictions: int = 0) -> str:
    """The layout of chunks with so many layers each, and layers of multi-token prediction in the last."""
    chunks = [f"t{count}" if count else "" for count in counts]
    return f"E{'/'.join(chunks)}{'m' * predictions}L"


def _laid_out(text: str, model: Model, plan: Plan) -> list[int]:
    """Layers of each chunk of a layout, which has as many chunks and layers as there are."""
    layers = model.layers
    where = f"plan: pp_layout = {text if len(text) <= 40 else text[:37] + '...'!r}"
    try:
        counts = layers_of_chunks(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    chunks = plan.pp * plan.virtual_pp
    if len(counts) != chunks:
        fit = "" if len(counts) % plan.pp else f" or virtual_pp={len(counts) // plan.pp}"
        raise InputError(
            f"{where}: has {len(counts)} chunks, but pp x virtual_pp = {chunks}; write {chunks}, divided by /{fit}"
        )
    if (predictions := _written_out(_plain(text)).count("m")) != model.mtp_layers:
        raise InputError(
            f"{where}: has {predictions} m, but the model has mtp_layers = {model.mtp_layers}; write as many before L"
        )
    if sum(counts) != layers:
        raise InputError(f"{where}: has {sum(counts)} layers, but the model has {layers}; write {layers} t in all")
    return counts


def layers_of_chunks(text: str) -> list[int]:
    """Layers of each chunk of a layout: E embedding, t layer, m multi-token prediction, L loss, chunks divided by
    `/`, as `Et3/t4/t4/t3L`.

    As Megatron-LM writes them, too (`pipeline_model_parallel_layout`): divided by `|`, with `t*3`, groups as
    `(tt|)*29`, and commas that mean nothing. `InputError` says what is none.
    """
    chunks = _written_out(_plain(text)).split("/")
    last = len(chunks) - 1
    return [_layers(chunk, number, last) for number, chunk in enumerate(chunks)]


def _plain(text: str) -> str:
    return re.sub(r"[\s,]", "", text).replace("|", "/")


def _layers(chunk: str, number: int, last: int) -> int:
    if strange := re.sub("[EtmL]", "", chunk):
        raise InputError(f"{strange[0]!r} is no part of a model; write E embedding, t layer, L loss")
    if "m" in chunk and number < last:
        raise InputError(
            "m, multi-token prediction, stands apart from the loss: not simulated; write it before L in the last chunk"
        )
    if not chunk:
        raise InputError(f"chunk {number + 1} holds nothing; give it a layer, or take it out")
    if not re.fullmatch(("E" if number == 0 else "") + "t*" + ("m*L" if number == last else ""), chunk):
        raise InputError(
            f"chunk {number + 1} is {chunk[:20]!r}; begin the first with E, end the last with L, t between"
        )
    return chunk.count("t")


def _written_out(text: str) -> str:
    """A layout without repetitions: `t3`, `t*3` and `(tt/)*3` written out."""
    outer: list[str] = []
    done, unit, room = "", "", MAX_PARTS
    for token in _tokens(text):
        if token == "(":
            outer.append(done + unit)
            done, unit = "", ""
        elif token == ")" and outer:
            done, unit = outer.pop(), done + unit
        elif token.isdecimal():
            room -= len(unit) * int(token)
            if not unit or room < 0:
                problem = f"makes over {MAX_PARTS} parts" if unit else "repeats nothing"
                raise InputError(f"{token} {problem}; write a count behind a part or a group, as t3 or (tt/)*3")
            done, unit = done + unit * int(token), ""
        else:
            done, unit = done + unit, token
    if outer:
        raise InputError("a parenthesis is not closed; write groups as (tt/)*3")
    return done + unit


def _tokens(text: str) -> Iterator[str]:
    """Characters and counts; the star before a count says nothing."""
    for star, character in re.findall(r"\*?([0-9]{1,6})|(.)", text):
        yield star or character
