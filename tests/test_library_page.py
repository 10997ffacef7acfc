"""Each cell of the page on libraries leads to the rows that show it."""

import csv
import re

import pytest

from spsim.inputs.libraries import LIBRARIES
from tests.test_docs import ROOT

ROWS = [*csv.reader((ROOT / "experiments" / "data" / "libraries.csv").open())]
PAGE = (ROOT / "docs" / "libraries.md").read_text()
LINK = re.compile(r"\[([^\]]+)\]\(\.\./experiments/data/libraries\.csv#L(\d+)\)")
ABBREVIATED = {
    "AR": {"all_reduce"}, "AG": {"all_gather"}, "RS": {"reduce_scatter"}, "A2A": {"all_to_all"}, "SR": {"send_receive"}
}  # fmt: skip
SENDS = PAGE.partition("## What they send")[2].partition("## What they keep")[0]
LINES = [line.split("|")[1:-1] for line in SENDS.splitlines() if "#L" in line]


def told() -> list[tuple[str, dict[str, str]]]:
    """(library and version, cell by pass) of each line of the first table; a name stands for those below, too."""
    library, found = "", []
    for own, _, *cells in LINES:
        library = own.strip() or library
        found.append((library, dict(zip(("forward", "backward", "step"), cells, strict=True))))
    return found


@pytest.mark.parametrize(("library", "cells"), told())
def test_a_line_leads_to_rows_of_its_library_and_pass(library, cells):
    name, version = library.replace("Megatron-Core", "megatron-core").replace("DeepSpeed", "deepspeed").split()
    for own, cell in cells.items():
        for text, line in LINK.findall(cell):
            found, installed, _, _, row_pass, order, collective, count, *_ = ROWS[int(line) - 1]
            assert (found, installed.partition("+")[0]) == (name, version)
            assert row_pass in ({own, "recompute"} if own == "backward" else {own})
            assert order == min((row[5] for row in ROWS if row[:5] == ROWS[int(line) - 1][:5]), key=int)
            if said := re.match(r"(?:(\d) )?(AR|AG|RS|A2A|SR)\b", text):
                assert collective in ABBREVIATED[said[2]]
                assert said[1] is None or int(said[1]) >= int(count)


def test_the_page_names_each_library_in_the_version_of_its_record():
    named = {tuple(library.lower().split()) for library, _ in told()}
    assert named == {(name, record.version) for name, record in LIBRARIES.items()}


def test_every_link_is_to_a_row():
    links = [int(line) for _, line in LINK.findall(PAGE)]
    assert len(links) > 40
    assert all(1 < line <= len(ROWS) for line in links)
