"""Megatron-LM: launch scripts to settings, and scenarios to launch scripts."""

from __future__ import annotations

from pathlib import Path

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.megatron.arguments import CALLED as CALLED
from spsim.inputs.launch.megatron.arguments import LIBRARY as LIBRARY
from spsim.inputs.launch.megatron.arguments import NO_MATTER as NO_MATTER
from spsim.inputs.launch.megatron.command import options_of, read_world
from spsim.inputs.launch.megatron.reading import read
from spsim.inputs.launch.megatron.writing import text as text
from spsim.inputs.launch.options import Options


def drafted(text: str, path: Path) -> tuple[Draft, Options]:
    """What the text of a script says."""
    options, launcher = options_of(text, path)
    draft = read(options)
    read_world(launcher, draft)
    return draft, options
