"""Is every op of TensorFlow differentiated rightly, or refused by name?

For each op of `tf.raw_ops` that has a gradient, inputs are made up: generic ones, and
special points (zeros, ties, repeated rows). The derivatives of orders one and two, on
several roads, are held against differences of values in double precision. Ops for which
no inputs could be made up are listed. A line that is indented is to be looked at: what
a cast rounds counts as wrong here, and so do a second derivative with a small kink at
the point (Elu). Run it by
hand; `raw_ops.txt` is what it printed:

    python benchmarks/raw_ops.py --grad --hvp --xla ... [first letters of ops]
"""

from __future__ import annotations

import collections
import inspect
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

import tfgrad

Array = np.ndarray

ROADS: dict[str, Callable[[Any, Array, Array], Any]] = {
    "grad": lambda f, x, v: np.sum(tfgrad.grad(f)(x) * v),
    "xla": lambda f, x, v: np.sum(tfgrad.grad(f, jit=True)(x) * v),
    "jvp": lambda f, x, v: tfgrad.jvp(f, (x,), (v,))[1],
    "vjp": lambda f, x, v: np.sum(tfgrad.vjp(f, x)[1](1.0)[0] * v),
    "hvp": lambda f, x, v: np.sum(tfgrad.hvp(f)(x, v) * v),
    "hessian": lambda f, x, v: (
        v.ravel()
        @ tf.reshape(tfgrad.hessian(f)(x), [x.size, x.size]).numpy()
        @ v.ravel()
    ),
    "xla2": lambda f, x, v: np.sum(tfgrad.hvp(f, jit=True)(x, v) * v),
    "tape": lambda f, x, v: _by_tape(f, x, v),
    "graph": lambda f, x, v: tf.function(lambda: _by_tape(f, x, v))(),
}
"""From a function, a point and a direction to a derivative along it."""

MOST = 16
"""Points that are tried for one op."""

FIRST = ("grad", "xla", "jvp", "vjp")


def _by_tape(f: Any, x: Array, v: Array) -> tf.Tensor:
    point = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(point)
        slope = tf.reduce_sum(tfgrad.grad(f)(point) * v)
    found = tape.gradient(slope, point)
    return tf.zeros([], tf.float64) if found is None else tf.reduce_sum(found * v)


def points(generator: np.random.Generator) -> dict[str, Array]:
    """Return arrays to try, by name."""
    generic = generator.normal(size=(3, 3))
    zeros = generic.copy()
    zeros[0, 1] = zeros[2, 2] = 0.0
    return {
        "generic": generic,
        "positive": np.abs(generic) + 0.3,
        "in the unit interval": generator.uniform(0.2, 0.8, size=(3, 3)),
        "with zeros": zeros,
        "ones": np.ones((3, 3)),
        "symmetric": generic + generic.T + 4 * np.eye(3),
        "whole numbers": np.array([[1.0, 2, 2], [3, 1, 2], [2, 2, 4]]),
    }


OF_OP: dict[str, dict[str, Any]] = {
    "Cast": {"DstT": tf.float64},  # what another dtype rounds is too coarse here
    "Reverse": {"dims": [True, False]},
    "ReverseV2": {"axis": [1]},
    "ScatterNd": {"indices": [[0], [2], [2]], "shape": [4, 3]},
    "SpaceToBatch": {"paddings": [[0, 0], [0, 0]], "block_size": 3},
    "SpaceToBatchND": {"paddings": [[0, 0]], "block_shape": [3]},
    "SpaceToDepth": {"block_size": 3},
    "DepthToSpace": {"block_size": 1},
    "SplitV": {"size_splits": [1, 2], "axis": 0, "num_split": 2},
    "StridedSlice": {"begin": [0, 1], "end": [3, 3], "strides": [2, 1]},
    "TensorScatterAdd": {"indices": [[0], [2], [2]]},
    "TensorScatterSub": {"indices": [[0], [2], [2]]},
    "TensorScatterMax": {"indices": [[0], [2], [1]]},
    "TensorScatterMin": {"indices": [[0], [2], [1]]},
    "Polygamma": {"a": np.full((3, 3), 2.0)},
    "SoftmaxCrossEntropyWithLogits": {
        "features": np.full((3, 3), 0.7),
        "labels": np.full((3, 3), 0.3),
    },
}
"""Inputs and attributes that fit one op."""

OTHERS: dict[str, list[Any]] = {
    "axis": [0, 1],
    "reduction_indices": [[1]],
    "dim": [0],
    "indices": [[0, 2, 0]],
    "segment_ids": [[0, 0, 1]],
    "num_segments": [2],
    "shape": [[9]],
    "size": [[2, 2]],
    "begin": [[0, 1]],
    "perm": [[1, 0]],
    "multiples": [[1, 2]],
    "paddings": [[[1, 0], [0, 1]], [[0, 0], [1, 1], [1, 1], [0, 0]]],
    "k": [2],
    "fft_length": [[3], [2], [3, 3]],
    "num_lower": [1],
    "num_upper": [1],
    "diagonal": [np.array([1.0, 2.0, 3.0])],
    "T": [None],
    "seq_lengths": [[1, 3, 2]],
    "seq_dim": [1],
    "dy": [np.full((3, 3), 0.7)],
    "gradients": [np.full((3, 3), 0.7)],
}
"""What to try for inputs and attributes by their names."""


def _list(x: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.TensorListFromTensor(tensor=x, element_shape=[3])


def _stacked(handle: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.TensorListStack(input_handle=handle, **_ELEMENTS)


def _scattered(kind: str, indices: list[int], **options: Any) -> Callable[..., Any]:
    op, options = getattr(tf.raw_ops, kind), {"element_shape": [3], **options}
    return lambda x: _stacked(op(tensor=x, indices=indices, **options))


_ELEMENTS = {"element_shape": [3], "element_dtype": tf.float64}

FUNCTIONS: dict[str, list[Callable[[tf.Tensor], Any]]] = {
    "Merge": [],
    "ResizeBicubic": [],
    "ResizeBilinear": [],
    "Real": [lambda x: tf.math.real(tf.complex(x, x**2) ** 2)],
    "StridedSliceGrad": [
        lambda x: tf.raw_ops.StridedSliceGrad(
            shape=[5, 4], begin=[0, 1], end=[5, 4], strides=[2, 1], dy=x
        )
    ],
    "TensorListConcat": [
        lambda x: tf.raw_ops.TensorListConcat(input_handle=_list(x), **_ELEMENTS)[0]
    ],
    "TensorListConcatV2": [
        lambda x: tf.raw_ops.TensorListConcatV2(
            input_handle=_list(x), leading_dims=[3, 3, 3], **_ELEMENTS
        )[0]
    ],
    "TensorListFromTensor": [lambda x: _stacked(_list(x))],
    "TensorListGather": [
        lambda x: tf.raw_ops.TensorListGather(
            input_handle=_list(x), indices=[2, 0, 2], **_ELEMENTS
        )
    ],
    "TensorListGetItem": [
        lambda x: tf.raw_ops.TensorListGetItem(
            input_handle=_list(x), index=1, **_ELEMENTS
        )
    ],
    "TensorListPopBack": [
        lambda x: _popped(
            tf.raw_ops.TensorListPopBack(input_handle=_list(x), **_ELEMENTS)
        )
    ],
    "TensorListPushBack": [
        lambda x: _stacked(
            tf.raw_ops.TensorListPushBack(input_handle=_list(x), tensor=x[0] * x[1])
        )
    ],
    "TensorListResize": [
        lambda x: _stacked(tf.raw_ops.TensorListResize(input_handle=_list(x), size=2))
    ],
    "TensorListScatter": [
        _scattered("TensorListScatter", [2, 0, 1]),
        _scattered("TensorListScatter", [1, 0, 1]),
    ],
    "TensorListScatterV2": [
        _scattered("TensorListScatterV2", [2, 0, 1], num_elements=3),
        _scattered("TensorListScatterV2", [1, 0, 1], num_elements=2),
    ],
    "TensorListScatterIntoExistingList": [
        lambda x: _stacked(
            tf.raw_ops.TensorListScatterIntoExistingList(
                input_handle=_list(x), tensor=x**2, indices=[1, 0, 1]
            )
        )
    ],
    "TensorListSetItem": [
        lambda x: _stacked(
            tf.raw_ops.TensorListSetItem(
                input_handle=_list(x), index=1, item=x[0] * x[1]
            )
        )
    ],
    "TensorListSplit": [
        lambda x: tf.raw_ops.TensorListConcat(
            input_handle=tf.raw_ops.TensorListSplit(
                tensor=x, element_shape=[-1, 3], lengths=[1, 2]
            ),
            element_shape=[-1, 3],
            element_dtype=tf.float64,
        )[0]
    ],
    "TensorListStack": [lambda x: _stacked(_list(x**2))],
    "TensorScatterUpdate": [
        lambda x: tf.tensor_scatter_nd_update(x, [[0], [2], [2]], x**2)
    ],
    "TensorStridedSliceUpdate": [
        lambda x: tf.raw_ops.TensorStridedSliceUpdate(
            input=x, begin=[0, 1], end=[3, 3], strides=[2, 1], value=x[:2, :2] ** 2
        )
    ],
    "Zeta": [
        lambda x: tf.math.zeta(tf.constant(2.5, x.dtype), tf.abs(x) + 1.5),
        lambda x: tf.math.zeta(tf.abs(x) + 1.5, tf.constant(2.5, x.dtype)),
    ],
}
"""Functions of an array of 3 by 3 for what takes a list, or has inputs that fit."""

WITHOUT = {
    "ResourceGather": "it reads a variable: `wrt=` has tests of its own",
    "ResourceGatherNd": "it reads a variable: `wrt=` has tests of its own",
    "Resize": "it answers in float32, too coarse for these differences: test_repairs",
    "Merge": "TensorFlow 2 makes If and While only",
    "TopK": "TensorFlow 2 makes TopKV2 only",
    "TensorArray": "TensorFlow 2 makes TensorList only",
}
"""Why an op has no inputs here, by how its name begins."""


def _popped(found: Any) -> tf.Tensor:
    return _stacked(found.output_handle)[0] * found.tensor


def calls(
    name: str, generator: np.random.Generator
) -> Iterator[tuple[str, Any, Array]]:
    """Yield (what, function of one array, point) for an op."""
    for number, function in enumerate(FUNCTIONS.get(name, [])):
        for label, point in points(generator).items():
            yield f"{number}, {label}", _summed(function), point
    if name not in FUNCTIONS:
        yield from _made_up(name, generator)


def _summed(function: Callable[[tf.Tensor], Any]) -> Callable[[tf.Tensor], tf.Tensor]:
    return lambda x: _number(function(x))


def _made_up(
    name: str, generator: np.random.Generator
) -> Iterator[tuple[str, Any, Array]]:
    op = getattr(tf.raw_ops, name)
    parameters = [
        p for p in inspect.signature(op).parameters.values() if p.name != "name"
    ]
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    definition = _definition(name)
    floats = {
        argument.name
        for argument in definition.input_arg
        if argument.type_attr in ("T", "dtype", "SrcT", "") or argument.number_attr
    }
    tried = []
    for moving in sorted(floats.intersection(required)):
        others = [other for other in required if other != moving]
        known = {other: [value] for other, value in OF_OP.get(name, {}).items()}
        known = OTHERS | known
        options = [known.get(other, [np.full((3, 3), 0.7), 1]) for other in others]
        chosen = list(itertools.islice(itertools.product(*options), 4))
        shapes = ((3, 3),) if "Grad" in name else ((3, 3), (1, 3, 3, 1))
        for label, shape in itertools.product(points(generator).items(), shapes):
            given = [dict(zip(others, c, strict=True)) for c in chosen]
            tried += [(moving, label, shape, arguments) for arguments in given]
    for at in generator.permutation(len(tried)):
        moving, (label, point), shape, arguments = tried[at]

        def f(x, moving=moving, shape=shape, arguments=arguments):
            given = tf.reshape(x, shape)
            given = [given] if _is_list(definition, moving) else given
            return _number(op(**arguments, **{moving: given}))

        if _can_be_traced(f):
            yield f"{moving}, {label}", f, point


def _can_be_traced(f: Any) -> bool:
    spec = tf.TensorSpec([3, 3], tf.float64)
    try:
        tf.function(f, autograph=False).get_concrete_function(spec)
    except Exception:  # eager mode converts inputs that a graph does not
        return False
    return True


def _definition(name: str) -> Any:
    from tensorflow.python.framework import op_def_registry

    return op_def_registry.get(name)


def _is_list(definition: Any, argument: str) -> bool:
    return any(a.name == argument and a.number_attr for a in definition.input_arg)


def _number(output: Any) -> tf.Tensor:
    """Return a weighted sum of all float outputs."""
    terms = []
    for leaf in tf.nest.flatten(output):
        if not isinstance(leaf, tf.Tensor):
            continue
        if leaf.dtype.is_complex:
            leaf = tf.math.real(leaf) + 2 * tf.math.imag(leaf)
        if leaf.dtype.is_floating:
            flat = tf.cast(tf.reshape(leaf, [-1]), tf.float64)
            weights = tf.cast(tf.range(tf.size(flat)), tf.float64)
            terms.append(tf.reduce_sum(flat * tf.cos(weights) + 0.1 * flat**2))
    if not terms:
        raise TypeError("no float output")
    return tf.add_n(terms)


def difference(f: Any, x: Array, v: Array) -> tuple[float, float] | None:
    """Return the slope along v if both sides agree, and twice that of the slope."""
    h = 1e-6
    values = [float(f(tf.constant(x + t * h * v))) for t in (-1, 0, 1)]
    left, right = (values[1] - values[0]) / h, (values[2] - values[1]) / h
    if not np.isfinite([left, right]).all():
        return None
    slope = (left + right) / 2
    if abs(left - right) > 1e-3 * max(1.0, abs(slope)):
        return None
    h = 1e-3  # fourth order: the second derivative of the values themselves
    far = [float(f(tf.constant(x + t * h * v))) for t in range(-3, 4)]
    second = (-far[1] + 16 * far[2] - 30 * far[3] + 16 * far[4] - far[5]) / (12 * h * h)
    sides = np.array([[-1, 4, -5, 2, 0, 0, 0], [0, 0, 0, 2, -5, 4, -1]]) @ far / h**2
    if not np.ptp(sides) <= 0.1 * max(1.0, abs(second)):  # a kink of the first
        second = np.nan
    return slope, second


def verdict(
    road: str, f: Any, x: Array, v: Array, expected: tuple[float, float]
) -> str:
    """Return "right", "refused", "wrong" or "foreign"."""
    try:
        found = float(ROADS[road](f, x, v))
    except tfgrad.errors.TfgradError:
        return "refused"
    except Exception as error:  # anything else is what a user should not see
        if "gradient registry has no entry" in str(error):  # by a tape of the user's
            return "refused"
        return f"foreign {type(error).__name__}"
    first = road in FIRST
    value, tolerance = (expected[0], 1e-3) if first else (expected[1], 1e-2)
    if np.isnan(found):
        return "nan"
    return (
        "right" if abs(found - value) <= tolerance * max(1.0, abs(value)) else "wrong"
    )


def sweep(name: str, roads: list[str]) -> collections.Counter[str]:
    """Return how often each verdict was reached for an op; print what is wrong."""
    generator = np.random.default_rng(0)
    counts: collections.Counter[str] = collections.Counter()
    for what, f, x in calls(name, generator):
        v = generator.normal(size=x.shape)
        if what.endswith("symmetric"):  # as it is meant: some ops read one triangle
            v += v.T
        try:
            expected = difference(f, x, v)
        except Exception:  # these inputs are none for this op
            continue
        if expected is None:
            continue
        for road in roads:
            if road not in FIRST and np.isnan(expected[1]):
                continue
            found = verdict(road, f, x, v, expected)
            if found == "wrong" and road.startswith("xla"):  # of another function?
                compiled = tf.function(f, autograph=False, jit_compile=True)
                found = verdict(road, f, x, v, difference(compiled, x, v) or expected)
            counts[found if found == "right" else f"{found} by {road}"] += 1
            if found not in ("right", "refused"):
                print(f"  {name}({what}) by {road}: {found}, {expected}", flush=True)
        if sum(counts.values()) >= MOST * len(roads):
            break
    return counts


def names(prefixes: list[str]) -> list[str]:
    """Return the ops that have a gradient, which is meant to be the slope."""
    from tensorflow.python.framework import ops

    registered = [str(name) for name in ops.gradient_registry.list()]
    found = [n for n in registered if hasattr(tf.raw_ops, n)]
    found = [n for n in found if ops.gradient_registry.lookup(n) is not None]
    found = [n for n in found if not n.startswith("QuantizeAndDequantize")]
    return sorted(n for n in found if not prefixes or n.startswith(tuple(prefixes)))


def main(arguments: list[str]) -> None:
    """Print a table of ops and verdicts."""
    warnings.simplefilter("ignore")
    roads = [a[2:] for a in arguments if a.startswith("--")] or ["grad", "hvp", "tape"]
    totals: collections.Counter[str] = collections.Counter()
    untried = []
    start = time.perf_counter()
    for name in names([a for a in arguments if not a.startswith("--")]):
        counts = sweep(name, roads)
        totals += counts
        if not counts:
            reason = next((r for k, r in WITHOUT.items() if name.startswith(k)), "")
            untried.append(f"{name} ({reason})" if reason else name)
            continue
        print(f"{name}: {dict(counts)}", flush=True)
    print(f"no inputs for {len(untried)}: {'; '.join(untried)}")
    print(dict(totals), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
