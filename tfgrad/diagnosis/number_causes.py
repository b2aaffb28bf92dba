"""Why a number goes wrong, in words: op by op, for zeros, and for NaN and infinity."""

from __future__ import annotations

import tensorflow as tf

from tfgrad.diagnosis.causes import Cause

_MOVE = "another starting point or a smaller scale: here the slope is zero"
_LEAKY = "tf.nn.leaky_relu, another initialisation, or a smaller step"
_LOGITS = "logits with from_logits=True, or inputs of about unit size"

_ZEROS = {
    "Relu": Cause("relu", "no input is positive, so it is flat", _LEAKY),
    "Relu6": Cause("relu6", "no input is between 0 and 6, so it is flat", _LEAKY),
    "Sigmoid": Cause("tf.sigmoid", "it is saturated by large inputs", _LOGITS),
    "Tanh": Cause("tf.tanh", "it is saturated by large inputs", _LOGITS),
    "Softmax": Cause("tf.nn.softmax", "it is saturated by large inputs", _LOGITS),
    "Erf": Cause("tf.math.erf", "it is saturated by large inputs", _LOGITS),
    "Exp": Cause("tf.exp", "it underflows", "tf.reduce_logsumexp, or the logarithm"),
    "Sign": Cause("tf.sign", "its slope is zero everywhere", "tf.tanh(x / width)"),
    "Mul": Cause("a product", "its other factor is zero", _MOVE),
    "MatMul": Cause("a matrix product", "its other factor is zero", _MOVE),
    "Pow": Cause("a power", "its slope at zero is zero", _MOVE),
    "Square": Cause("tf.square", "its slope at zero is zero", _MOVE),
    "Abs": Cause("tf.abs", "TensorFlow takes zero for its slope at zero", _MOVE),
    "Maximum": Cause("tf.maximum", "the other argument is larger everywhere", _LEAKY),
    "Minimum": Cause("tf.minimum", "the other argument is smaller everywhere", _LEAKY),
    "ClipByValue": Cause(
        "tf.clip_by_value",
        "all inputs are outside of the limits",
        "wider limits, or x + tf.stop_gradient(clipped - x)",
    ),
    "SelectV2": Cause("tf.where", "it takes the other branch everywhere", _MOVE),
    "EagerPyFunc": Cause(
        "tf.py_function",
        "what NumPy computes in it is not recorded",
        "the same in tf.math or tf.experimental.numpy, or a tf.custom_gradient",
    ),
    "IdentityN": Cause(
        "tf.custom_gradient",
        "its gradient function returns zero",
        "tfgrad.check_grads to check it",
    ),
}

_INSIDE = "an argument kept inside: tf.maximum(x, 1e-6), or a double tf.where"
_DOUBLE = (
    "a double tf.where: f(tf.where(ok, x, 1.0)) where ok, the other value where not"
)
_SQRT = "tf.sqrt(x + 1e-12), or a double tf.where"
_LOG = "tf.math.log(x + 1e-6), tf.nn.log_softmax or tf.math.xlogy"
_DIVIDE = "tf.math.divide_no_nan, or a double tf.where"
_LARGE = "a smaller scale, or float64; tf.reduce_logsumexp for a log of sums of exp"

_VALUES = {
    "Log": Cause("tf.math.log", "an argument is not positive", _LOG),
    "Log1p": Cause("tf.math.log1p", "an argument is not above -1", _INSIDE),
    "Sqrt": Cause("tf.sqrt", "an argument is negative", _INSIDE),
    "Rsqrt": Cause("tf.math.rsqrt", "an argument is not positive", _INSIDE),
    "Reciprocal": Cause("1 / x", "an argument is zero", _DIVIDE),
    "RealDiv": Cause("a division", "a divisor is zero or too small", _DIVIDE),
    "Pow": Cause("a power", "a base is negative or zero, or it overflows", _INSIDE),
    "Exp": Cause("tf.exp", "it overflows", _LARGE),
    "Square": Cause("tf.square", "it overflows", _LARGE),
    "Mul": Cause("a product", "it overflows, or a factor is infinite", _LARGE),
    "Acos": Cause("tf.acos", "an argument is outside of -1 to 1", _INSIDE),
    "Asin": Cause("tf.asin", "an argument is outside of -1 to 1", _INSIDE),
    "Atanh": Cause("tf.atanh", "an argument is not inside of -1 to 1", _INSIDE),
    "Lgamma": Cause("tf.math.lgamma", "an argument is zero or a pole", _INSIDE),
    "ReadVariableOp": Cause(
        "a variable", "it already holds a NaN or an infinity", "its last finite value"
    ),
    "Placeholder": Cause(
        "an argument", "it already holds a NaN or an infinity", "finite numbers"
    ),
}

_SLOPES = {
    "Sqrt": Cause("tf.sqrt", "its slope at zero is infinite", _SQRT),
    "Rsqrt": Cause("tf.math.rsqrt", "its slope at zero is infinite", _SQRT),
    "Pow": Cause("a power", "its slope at zero is infinite or undefined", _INSIDE),
    "Acos": Cause("tf.acos", "its slope at -1 and 1 is infinite", _INSIDE),
    "Asin": Cause("tf.asin", "its slope at -1 and 1 is infinite", _INSIDE),
    "Atan2": Cause("tf.atan2", "it has no slope at (0, 0)", _DOUBLE),
    "Log": Cause("tf.math.log", "its slope at zero is infinite", _DOUBLE),
    "Reciprocal": Cause("1 / x", "its slope at zero is infinite", _DOUBLE),
    "RealDiv": Cause(
        "a division", "its slope at a divisor of zero is infinite", _DOUBLE
    ),
    "Lgamma": Cause("tf.math.lgamma", "its slope at zero is infinite", _DOUBLE),
}

UNSOLVED, INDEFINITE = "tfgrad_unsolved", "tfgrad_indefinite"
"""What the ops are called by which `tfgrad.solution` withholds a number."""

_NAMED = {
    UNSOLVED: Cause(
        "tfgrad.solution",
        "its inner minimisation did not arrive at a solution",
        "more steps=, another start, or the same call by itself, which says why",
    ),
    INDEFINITE: Cause(
        "tfgrad.solution",
        "the Hessian at its solution is not positive, so it has no derivative",
        "another start, or a small ridge; the same call by itself has the numbers",
    ),
}


def cause_of_zero(op: tf.Operation) -> Cause:
    """Return the words for an op whose gradient is zero in every element."""
    reason = "its slope is exactly zero here"
    return _ZEROS.get(op.type, Cause(_label(op), reason, _MOVE))


def cause_of_nonfinite(op: tf.Operation, *, backward: bool) -> Cause:
    """Return the words for an op that turns finite numbers into NaN or infinity."""
    for name, cause in _NAMED.items():
        if name in op.name:
            return cause
    if backward:
        reason = "its gradient is not finite here"
        return _SLOPES.get(op.type, Cause(_label(op), reason, _DOUBLE))
    reason = "its value is not finite here"
    return _VALUES.get(op.type, Cause(_label(op), reason, _INSIDE))


def _label(op: tf.Operation) -> str:
    kinds = {"While": "a loop", "If": "a branch", "Case": "a branch"}
    return kinds.get(op.type.removeprefix("Stateless"), f"the op {op.type}")
