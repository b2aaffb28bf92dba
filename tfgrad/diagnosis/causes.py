"""What cuts a gradient, in words: op by op, why it does and what to write instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import tensorflow as tf

from tfgrad.diagnosis.lines import Line


class Cause(NamedTuple):
    """Why an op spoils a gradient: what users call it, the reason, what to write."""

    label: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Culprit:
    """The op that spoils a gradient, and how.

    Attributes:
        op: The type of the op, such as "Round"; "" where the function left TensorFlow.
        where: The user's line that made it.
        label: What it is called in user code, such as "tf.round".
        reason: Why it spoils the gradient.
        hint: What to write instead.
        name: The name of the op in the graph: the layers that it is in come first.
    """

    op: str
    where: Line
    label: str
    reason: str
    hint: str
    name: str = ""

    def within(self, line: Line) -> Self:
        """Return it with `line`, that of the op around it, if its own is unknown."""
        return self if self.where else replace(self, where=line)


_STEP = "it is constant between its jumps, so TensorFlow defines no gradient"
_TRUTH = "true and false have no slope"
_INDEX = "a position is a whole number, which has no slope"
_COUNT = "a count is a whole number, which has no slope"
_SAMPLE = "a discrete sample does not move with its distribution"
_OUTSIDE = "the code in it runs outside of TensorFlow, where nothing is recorded"
_WRITE = "a value that goes through a variable is not followed"
_NONE = "TensorFlow defines no gradient for it"

_STRAIGHT_THROUGH = "x + tf.stop_gradient({0}(x) - x), a straight-through estimator"
_SMOOTH_STEP = "tf.sigmoid((a - b) / width) for a > b, or tf.where on smooth branches"
_SOFTMAX = "tf.nn.softmax(x / temperature), or tf.reduce_max for the value itself"
_SOFT_COUNT = "a sum of tf.sigmoid((x - edge) / width), a smooth count"
_GUMBEL = "Gumbel-softmax: tf.nn.softmax((logits + gumbel_noise) / temperature)"
_IN_TENSORFLOW = "the same in tf.math or tf.experimental.numpy, or a tf.custom_gradient"
_AS_TENSOR = "the new value itself where it is needed, instead of the variable"
_OTHER = "a smooth stand-in, tf.custom_gradient, or tf.stop_gradient if zero is meant"

CAUSES = {
    "Round": Cause("tf.round", _STEP, _STRAIGHT_THROUGH.format("tf.round")),
    "Rint": Cause("tf.math.rint", _STEP, _STRAIGHT_THROUGH.format("tf.math.rint")),
    "Floor": Cause("tf.floor", _STEP, _STRAIGHT_THROUGH.format("tf.floor")),
    "Ceil": Cause("tf.math.ceil", _STEP, _STRAIGHT_THROUGH.format("tf.math.ceil")),
    "FloorDiv": Cause("//", _STEP, "a / b, or a straight-through estimator"),
    "Sign": Cause("tf.sign", _STEP, "tf.tanh(x / width)"),
    "Greater": Cause(">", _TRUTH, _SMOOTH_STEP),
    "GreaterEqual": Cause(">=", _TRUTH, _SMOOTH_STEP),
    "Less": Cause("<", _TRUTH, _SMOOTH_STEP),
    "LessEqual": Cause("<=", _TRUTH, _SMOOTH_STEP),
    "Equal": Cause("==", _TRUTH, "tf.exp(-((a - b) / width) ** 2), a smooth match"),
    "NotEqual": Cause("!=", _TRUTH, "1 - tf.exp(-((a - b) / width) ** 2)"),
    "InTopKV2": Cause("tf.math.in_top_k", _TRUTH, "a cross entropy as the objective"),
    "ArgMax": Cause("tf.argmax", _INDEX, _SOFTMAX),
    "ArgMin": Cause("tf.argmin", _INDEX, _SOFTMAX.replace("x /", "-x /", 1)),
    "TopKV2": Cause("the indices of tf.math.top_k", _INDEX, _SOFTMAX),
    "Where": Cause("tf.where(condition)", _INDEX, "tf.where(condition, a, b)"),
    "Unique": Cause("tf.unique", _NONE, "the values sorted, or a fixed set of values"),
    "LowerBound": Cause("tf.searchsorted", _INDEX, _SOFT_COUNT),
    "UpperBound": Cause("tf.searchsorted", _INDEX, _SOFT_COUNT),
    "Bucketize": Cause("bucketize", _INDEX, _SOFT_COUNT),
    "HistogramFixedWidth": Cause("tf.histogram_fixed_width", _COUNT, _SOFT_COUNT),
    "Bincount": Cause("tf.math.bincount", _COUNT, _SOFT_COUNT),
    "DenseBincount": Cause("tf.math.bincount", _COUNT, _SOFT_COUNT),
    "Multinomial": Cause("tf.random.categorical", _SAMPLE, _GUMBEL),
    "StatelessMultinomial": Cause("tf.random.stateless_categorical", _SAMPLE, _GUMBEL),
    "StatelessRandomBinomial": Cause("tf.random.stateless_binomial", _SAMPLE, _GUMBEL),
    "RandomPoissonV2": Cause("tf.random.poisson", _SAMPLE, "tf.random.gamma"),
    "PyFunc": Cause("tf.numpy_function", _OUTSIDE, _IN_TENSORFLOW),
    "PyFuncStateless": Cause("tf.numpy_function", _OUTSIDE, _IN_TENSORFLOW),
    "EagerPyFunc": Cause("tf.py_function", _OUTSIDE, _IN_TENSORFLOW),
    "AsString": Cause("tf.strings.as_string", "text has no slope", "the number itself"),
    "AssignVariableOp": Cause("assign", _WRITE, _AS_TENSOR),
    "AssignAddVariableOp": Cause("assign_add", _WRITE, _AS_TENSOR),
    "AssignSubVariableOp": Cause("assign_sub", _WRITE, _AS_TENSOR),
    "Lu": Cause(
        "tf.linalg.lu", _NONE, "tf.linalg.solve, slogdet or qr, which have one"
    ),
    "MatrixLogarithm": Cause(
        "tf.linalg.logm", _NONE, "tf.linalg.eigh for a symmetric x"
    ),
    "ResizeArea": Cause("tf.image.resize(method='area')", _NONE, "method='bilinear'"),
}
"""What the commonest cuts are called in user code, and their causes, by op type."""


def cause_of_cut(op: tf.Operation) -> Cause:
    """Return the words for the cut at `op`."""
    if op.type == "Cast":
        dtype = op.get_attr("DstT").name
        label = f"tf.cast to {dtype}"
        return Cause(label, f"{dtype} numbers have no slope", "the float itself")
    if op.type == "IdentityN":  # what tf.custom_gradient puts around its outputs
        reason = "its gradient function returns None for this argument"
        return Cause("tf.custom_gradient", reason, "tf.zeros_like(x) if zero is meant")
    return CAUSES.get(op.type, Cause(f"the op {op.type}", _NONE, _OTHER))


def cause_of_error(error: BaseException) -> Cause:
    """Return the words for a function that left TensorFlow, by the error it raised."""
    text = str(error)
    if "numpy array" in text or "NumPy" in text:
        return Cause("NumPy", _OUTSIDE, _IN_TENSORFLOW)
    if "'numpy'" in text or "numpy()" in text:
        return Cause(".numpy()", _OUTSIDE, "the tensor itself, without .numpy()")
    if "as a Python `bool`" in text:
        reason = "a Python branch on a tensor is not recorded"
        return Cause("a Python bool", reason, "tf.where or tf.cond on the tensor")
    if isinstance(error, TypeError) and ("float" in text or "non-tensor" in text):
        reason = "a Python number does not remember how it was made"
        return Cause("a Python number", reason, "the tensor itself, without float()")
    kind = type(error).__name__
    return Cause("Python code", f"TensorFlow cannot trace it ({kind})", _IN_TENSORFLOW)
