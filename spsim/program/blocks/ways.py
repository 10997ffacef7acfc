"""How the modules of a model run: as one kernel each, in single operations of torch, or as torch.compile joins those.

What single operations launch and keep is what autograd does with the modules of PyTorch 2.13, transformers 5.24 and
Megatron-Core 0.16 (`tests/test_eager_layers.py` holds it against such modules, traced). Numbers are of tensors as large
as the result of the module; biases and tables of rotations are small beside them and not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from spsim.inputs.model import Model
from spsim.program.launches import Launch, Launches
from spsim.work import FP32_BYTES, KernelName


class Kept(NamedTuple):
    """A tensor of the size of the result that only the module itself reads again."""

    name: str
    fp32: bool = False


class Way(NamedTuple):
    """How one module runs."""

    launches: Launches | None = None
    """Its kernels, where they are several, or are torch's own."""
    instead: tuple[Kept, ...] = ()
    """What is kept in place of what one kernel would keep;"""
    beside: tuple[Kept, ...] = ()
    """and what is kept beside that."""


class Ways(NamedTuple):
    """How the modules of a model run; each as one kernel unless given."""

    norm: Way = Way()
    head_norm: Way = Way()
    """Of q and k."""
    rope: Way = Way()
    activation: Way = Way()
    activation_of_two: Way = Way()
    """Of a gate and an up projection that are tensors of their own."""
    residual: Way = Way()
    softmax: Way = Way()
    repetition: Way | None = None
    """Of K and V for each head of Q, where unfused attention has them written out."""
    joins_residual: bool = False
    """A residual and the norm that reads it are one kernel."""


def ways_of(model: Model, element_bytes: int) -> Ways:
    """How the modules of a model run where an activation has so many bytes an element."""
    found = Ways()
    if model.kernels == "eager":
        found = _eager(model, fp32=element_bytes == FP32_BYTES)
    elif model.kernels == "compiled":
        found = Ways(softmax=_COMPILED_SOFTMAX, joins_residual=not model.parallel_residual and model.norms == "pre")
    return found._replace(repetition=_REPETITION) if model.repeats_kv else found


def _eager(model: Model, *, fp32: bool) -> Ways:
    rms_norm = _composite_norm(fp32) if model.composite_norm else _RMS_NORM
    return Ways(
        norm=_LAYER_NORM if model.norm == "layernorm" else rms_norm,
        head_norm=rms_norm,
        rope=_ROPE,
        activation=_activation(model),
        activation_of_two=_activation(model, joined=False),
        residual=_residual(model),
        softmax=_softmax(fp32, causal=model.causal),
    )


UNARY = Launch(narrow=2)
BINARY = Launch(narrow=3)
WIDE_UNARY = Launch(wide=2)
WIDE_BINARY = Launch(wide=3)
CAST = Launch(narrow=1, wide=1)
"""From 16 bits to fp32 or back: nothing where activations are in fp32."""
ADD = Launch(narrow=3, kernel="add")
SCALE = Launch(narrow=2, accesses=3)
"""By a broadcast vector: its elements are read one by one."""
SUM_TO_VECTOR = Launch(narrow=1, kernel="bias_gradient")
"""Over all tokens: the gradient of a bias or of a weight that scales."""
NEGATED_HALF = Launch(narrow=1, accesses=1)
HALF_OF_ZEROS = (Launch(narrow=1), Launch(narrow=1, accesses=1))
"""The gradient of half a tensor: zeros, and that half copied over them."""
STRIDED_ADD = ADD._replace(accesses=3)
OF_ROWS = Launch(rows=2)
"""From one number a row to another."""


def _native_norm(kernel: KernelName, numbers: int) -> Way:
    """torch's own kernel, with so many statistics a row."""
    forward = Launch(narrow=2, rows=numbers, kernel=kernel, kind="norm")
    return Way(Launches((forward,), (forward._replace(narrow=3, gradient=True),)))


_LAYER_NORM = _native_norm("layer_norm", 2)
_RMS_NORM = _native_norm("rms_norm", 1)


def _composite_norm(fp32: bool) -> Way:
    """RMSNorm as transformers writes it: `weight * (x * rsqrt(mean(x^2) + eps)).to(dtype)`, x a copy in fp32.

    The square and the product keep that copy, the product with the weight what it scales.
    """
    mean, scale = Launch(wide=1, rows=1), Launch(wide=2, rows=1, accesses=3)
    root = (OF_ROWS._replace(kernel="add"), OF_ROWS)
    forward = (CAST, WIDE_UNARY, mean, *root, scale, CAST, SCALE)
    of_weight = (SCALE, BINARY, SUM_TO_VECTOR)
    of_product = (WIDE_BINARY, scale, mean)
    of_root = (OF_ROWS, OF_ROWS, Launch(rows=3))
    of_mean = (mean._replace(accesses=2),)
    of_square = (WIDE_UNARY, WIDE_UNARY, WIDE_BINARY)
    backward = (*of_weight, CAST, *of_product, *of_root, *of_mean, *of_square, Launch(wide=3, kernel="add"), CAST)
    if fp32:
        return Way(_without_casts(forward, backward), beside=(Kept("normalised"),))
    return Way(Launches(forward, backward), instead=(Kept("in_fp32", fp32=True), Kept("normalised")))


def _without_casts(*passes: tuple[Launch, ...]) -> Launches:
    return Launches(*(tuple([launch for launch in own if launch is not CAST]) for own in passes))


_ROPE = Way(
    Launches(
        forward=(SCALE, NEGATED_HALF, SCALE, SCALE, STRIDED_ADD),
        backward=(SCALE, NEGATED_HALF, *2 * HALF_OF_ZEROS, ADD, SCALE, STRIDED_ADD),
    )
)
"""`x * cos + rotate_half(x) * sin`: half of x negated and joined with the other half, heads being
views of [b s a d]."""


def _activation(model: Model, *, joined: bool = True) -> Way:
    if model.gated_mlp:
        return _gated(model, joined=joined)
    bias = (SUM_TO_VECTOR,) if model.mlp_bias else ()
    if model.activation == "relu":
        return Way(Launches((UNARY,), (BINARY, *bias)))
    if model.activation == "squared_relu":
        # relu keeps its result, which is what the square keeps, too.
        backward = (UNARY, UNARY, BINARY, BINARY, *bias)
        return Way(Launches((UNARY, UNARY), backward), instead=(Kept("relu"),))
    gelu = Launch(narrow=2, kernel="gelu")
    return Way(Launches((gelu,), (gelu._replace(narrow=3, gradient=True), *bias)))


def _gated(model: Model, *, joined: bool) -> Way:
    """`f(gate) * up`, which are strided halves of one tensor where they are `joined`, as their gradients are then.
    Megatron-Core adds `glu_linear_offset` to `up`, in a tensor of its own.
    """
    accessed = 1 if joined else 0
    gate = Launch(narrow=2, accesses=2 * accessed, kernel="gelu" if model.activation == "geglu" else None)
    product = Launch(narrow=3, accesses=3 * accessed)
    of_gate = product._replace(kernel=gate.kernel, gradient=True)
    ends = (Launch(narrow=4, accesses=6),) if joined else ()
    biases = 2 * (SUM_TO_VECTOR,) if model.mlp_bias else ()
    if model.glu_offset is False:
        return Way(Launches((gate, product), (BINARY, product, of_gate, *ends, *biases)), beside=(Kept("gate"),))
    shifted = Launch(narrow=2, accesses=2 * accessed, kernel="add")
    launches = Launches((gate, shifted, BINARY), (BINARY, BINARY, of_gate, *ends, *biases))
    return Way(launches, beside=(Kept("gate"), Kept("shifted")))


def _residual(model: Model) -> Way:
    """Dropout and sum; a bias is added by the product before, and its gradient is a sum."""
    bias = (SUM_TO_VECTOR,) if model.bias else ()
    if not model.dropout:
        return Way(Launches((ADD,), bias))
    dropout = Launch(narrow=2, masks=1, kernel="dropout", kind="dropout")
    return Way(Launches((dropout, ADD), (dropout._replace(gradient=True), *bias)))


_REPETITION = Way(Launches((Launch(narrow=1, inputs=1, accesses=2, kernel="copy"),), (Launch(narrow=1, inputs=1),)))
"""Heads copied, and their gradients summed."""


def _softmax(fp32: bool, *, causal: bool) -> Way:
    """Scaled, masked by an addition, and in fp32, whose result is kept beside that in 16 bits."""
    softmax = Launch(wide=2, kernel="softmax", kind="softmax")
    mask = (Launch(narrow=2, accesses=3, kernel="add"),) if causal else ()
    forward = (UNARY, *mask, CAST, softmax, CAST)
    backward = (CAST, softmax._replace(wide=3, gradient=True), CAST, UNARY)
    if fp32:
        return Way(_without_casts(forward, backward))
    return Way(Launches(forward, backward), instead=(Kept("in_fp32", fp32=True),))


_COMPILED_SOFTMAX = Way(instead=(Kept("scores"),))
"""One kernel whose backward pass reads the scores again: all it keeps beside them is a sum and a maximum a row."""
