"""Runs the ranks of a calibration: those that torchrun has started, or one process a local GPU, or two on a CPU.

The latter talk through a store that this process holds.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from spsim.errors import InputError
from spsim.measuring.calibrate.session import KEPT, Note, Progress, Report, Settings
from spsim.measuring.processes.at_hand import CPU_RANKS, Position, count_gpus, is_leader, torchrun_position
from spsim.measuring.processes.processes import FAILED, Processes, RankError


def measure(settings: Settings, report: Report) -> None:
    """Measure what is missing in the raw file. `InputError` when a rank fails; what was measured stays."""
    position = torchrun_position()
    if position is not None:
        _run_as_rank(position, settings, report)
    else:
        _run_alone(settings, report)


def _run_as_rank(position: Position, settings: Settings, report: Report) -> None:
    from spsim.measuring.calibrate.rank_process import run_rank
    from spsim.measuring.calibrate.ranks import Ranks, store_of_launcher

    run_rank(Ranks(*position, store_of_launcher()), settings, report, _end_with_message)


def _end_with_message(text: str) -> None:
    """End this rank although its main thread hangs in a collective."""
    if is_leader():
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _run_alone(settings: Settings, report: Report) -> None:
    from spsim.measuring.calibrate.ranks import open_store

    gpus = count_gpus()
    if not gpus:
        report(Note("no GPU: measuring this machine's CPU, two processes of one thread each, gloo between them"))
    store = open_store(0, master=True)
    processes = Processes(gpus or CPU_RANKS, settings.raw, _rank_main, store.port, settings)
    try:
        for message in processes.messages():
            if isinstance(message, Progress):
                processes.doing = message.item
            report(message)
    except RankError as error:
        raise InputError(f"calibrate: {error}; {KEPT}") from None
    finally:
        processes.close()


def _rank_main(pipe: Connection, position: Position, port: int, settings: Settings) -> None:
    from spsim.measuring.calibrate.rank_process import run_rank
    from spsim.measuring.calibrate.ranks import Ranks, open_store

    def fail(text: str) -> None:
        pipe.send(InputError(text))
        os._exit(FAILED)

    try:
        run_rank(Ranks(*position, open_store(port)), settings, pipe.send, fail)
    except InputError as error:
        fail(str(error))
