"""Which ranks meet: those between whose times there is a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spsim.engine.tasks import Key, RankProgram


def meeting(programs: Iterable[Mapping[int, RankProgram]]) -> list[list[int]]:
    """The ranks of the programs of some segments, in sets that meet in none of them."""
    of_rank: dict[int, set[int]] = {}
    of_group: dict[Key, int] = {}
    for own in programs:
        for rank, program in own.items():
            of_rank.setdefault(rank, {rank})
            for communicator in {meeting.key[0] for task in program.tasks for meeting in task.meetings}:
                one, other = of_rank[rank], of_rank[of_group.setdefault(communicator, rank)]
                if one is not other:
                    one |= other
                    of_rank.update(dict.fromkeys(other, one))
    return [sorted(own) for own in {id(own): own for own in of_rank.values()}.values()]
