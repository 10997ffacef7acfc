"""The program of a recorded module on one GPU: its calls as they ran, with the storages as buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spsim.errors import InputError
from spsim.program.categories import categorise
from spsim.program.instructions import Buffer, Category, Compute, Part, Program, Saved, Section
from spsim.program.operators import TensorKind
from spsim.pytorch.modules.costs import kernels, operator_class
from spsim.pytorch.modules.tape import Call, Tape, Value


def single_gpu_program(tape: Tape) -> Program:
    """One kernel after the other. A storage is a buffer from the kernel that writes it to the last that reads
    it; what autograd keeps is read by the last kernel of its node.

    Parameters are there all the time and no buffers; their gradients stay once they are written. Several inputs are
    one buffer, and so are several gradients of outputs.
    """
    return _Program(tape).build()


def saved(tape: Tape) -> Iterator[Saved]:
    """What autograd keeps, each storage once, at the operator of the first node that keeps it."""
    keepers = {call.node: call.name for call in tape.forward if call.node is not None}
    written = {v.storage: (call, place) for call in tape.forward[::-1] for place, v in enumerate(call.results)}
    for storage, node in tape.kept.items():
        name, kind = _kind(*written[storage]) if storage in written else ("input", "activation")
        yield Saved(name, (), tape.storages[storage], kind, keepers.get(node, ""))


def _kind(call: Call, place: int) -> tuple[str, TensorKind]:
    """Name and kind of a result: what stands beside the output of a norm or of attention is no activation."""
    if call.results[place].dtype == "bool":
        return f"{call.name} mask", "mask"
    if place and operator_class(call) == "norm":
        return f"{call.name} statistics {place}", "norm statistics"
    if place and operator_class(call) == "attention":
        return (f"{call.name} log-sum-exp", "log-sum-exp") if place == 1 else (f"{call.name} seed", "constant")
    return f"{call.name} output", "activation"


class _Program:
    """The storages that are buffers so far."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.input = Buffer(0, "input", sum(value.bytes for value in tape.inputs), "temporary")
        self.output_gradient = Buffer(1, "output gradient", sum(v.bytes for v in tape.output_gradients), "temporary")
        self.buffers = {value.storage: self.input for value in tape.inputs}
        self.buffers |= {value.storage: self.output_gradient for value in tape.output_gradients}
        self.static = tape.parameters.keys()
        self.num_buffers = 2
        self.num_steps = 0

    def build(self) -> Program:
        """Forward, then backward."""
        tape = self.tape
        forward = [step for call in tape.forward for step in self._steps(call, ())]
        last = {call.node: index for index, call in enumerate(tape.backward) if call.launches}
        backward = []
        for index, call in enumerate(tape.backward):
            kept = tape.saved.get(call.node, ()) if call.node is not None and last.get(call.node) == index else ()
            backward += self._steps(call, kept)
        if not forward or (tape.output_gradients and not backward):
            raise InputError(f"{tape.name}: launches no kernel in a pass; there is nothing to simulate")
        gradients = [value for value in tape.input_gradients if value is not None]
        return categorise(
            Program(
                forward_sections=(Section(tuple(forward)),),
                backward_sections=(Section(tuple(backward)),) if backward else (),
                saved=tuple(saved(tape)), weight_sync=(), parameters=tape.trainable,
                inputs=(self.input,), outputs=(self._first(tape.outputs, self.input),),
                output_gradients=(self.output_gradient,) if backward else (),
                input_gradients=(self._first(gradients, self.output_gradient),) if backward else (),
            )
        )  # fmt: skip

    def _first(self, values: Iterable[Value], otherwise: Buffer) -> Buffer:
        return next((self.buffers[value.storage] for value in values if value.storage in self.buffers), otherwise)

    def _steps(self, call: Call, kept: Iterable[Value]) -> list[Compute]:
        """One step per kernel; the last of a call reads what its node keeps."""
        work = kernels(call)
        reads = self._read(call.tensors)
        writes = tuple(self._written(call)) if work else ()
        steps = [
            Compute(
                self.num_steps + index, call.name, operator_class(call), self._part(call), (kernel,),
                self._read([*call.tensors, *kept]) if index == len(work) - 1 else reads, () if index else writes,
            )
            for index, kernel in enumerate(work)
        ]  # fmt: skip
        self.num_steps += len(steps)
        return steps

    def _read(self, values: Iterable[Value]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.buffers[v.storage].id for v in values if v.storage in self.buffers))

    def _written(self, call: Call) -> Iterator[Buffer]:
        """New storages among the results, and reserved memory that is written for the first time."""
        for storage in dict.fromkeys(value.storage for value in (*call.results, *call.written)):
            if storage not in self.buffers and storage not in self.static:
                category: Category = "gradients" if storage in self.tape.parameter_gradients else "temporary"
                buffer = Buffer(self.num_buffers, call.name, self.tape.storages[storage], category)
                self.buffers[storage] = buffer
                self.num_buffers += 1
                yield buffer

    def _part(self, call: Call) -> Part:
        if call.phase == "forward":
            return "forward"
        if operator_class(call) != "gemm":
            return "backward"
        of_weights = any(value.storage in self.tape.parameter_gradients for value in call.results)
        return "wgrad" if of_weights else "dgrad"
