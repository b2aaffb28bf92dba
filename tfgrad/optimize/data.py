"""Where batches come from: arrays, data sets, and whatever Python can iterate over.

A source opens one iterator of TensorFlow for each epoch, so that the compiled loop
draws the batches itself. It can be opened at any batch of any epoch, in a new process,
too, and goes on from there as the first run did: what is drawn depends on the epoch and
the batch (and on the seeds of the data set) alone.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.derivatives.arguments import parameter_names
from tfgrad.diagnosis.graphs import has, operations_of
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_array_like,
    is_number,
    map_leaves,
    name_of,
    named_leaves,
)

BATCH_SIZE = 32
"""Rows of arrays in a batch unless told otherwise; Keras's default."""

SEED = 20260
"""Of the order of arrays, together with the epoch: a run repeats to the last bit."""

SIZE = "size of the batch"
"""A column of the rows: the weight of a batch in the mean of its epoch."""


class Source:
    """Batches, epoch by epoch; what a kind of data says nothing of is as here.

    Attributes:
        spec: The nest of specs of what its iterators yield.
        batches: How many there are in an epoch; None if nobody knows.
        is_endless: Whether an epoch is known to have no end.
        is_repeatable: Whether there is a second epoch.
        is_python: Whether a batch is made by what may change, such as a user's code or
            the variables.
        is_own: Whether each worker draws rows of its own.
        error: What the user's code raised instead of yielding a batch.
    """

    spec: Any
    batches: int | None = None
    is_endless, is_repeatable, is_python, is_own = False, True, False, False
    error: Exception | None = None

    def open(self, epoch: int, batch: int = 0) -> Any:
        """Return an iterator over an epoch from `batch` on; epochs in their order."""
        raise NotImplementedError

    def batch(self, drawn: Any) -> Nest:
        """Return the batch for what an iterator yielded; may be part of a trace."""
        return drawn

    def row(self, drawn: Any, index: int) -> str:
        """Return what to call a row of a batch in a message."""
        return f"row {index} of it"

    def example(self) -> Nest:
        """Return a batch, without a change of what the epochs yield.

        Raises:
            InvalidArgumentError: If there is none.
        """
        raise NotImplementedError

    def fold(self, add: Callable[[Any, Any], Any], start: Any) -> Any:
        """Return `add(... add(add(start, drawn), drawn) ...)` over one epoch.

        It may be part of a trace, and knows no order of the epochs.
        """
        raise NotImplementedError


def source_of(
    data: Any, batch_size: int | None, dtype: tf.DType | None = None
) -> Source:
    """Return the source for what a user passes as `data`.

    A `tf.data.Dataset` is taken as it is, and so is what a strategy has distributed. An
    array, or a tuple or dict of arrays, is cut in batches along the first dimension.
    Anything else is iterated over, anew in each epoch if it can be: a list of batches,
    a `keras.utils.PyDataset`, a function that returns an iterator, a generator.

    Args:
        data: See above.
        batch_size: How many rows of arrays a batch has.
        dtype: What NumPy's float arrays become, as beside a tensor of that dtype; None
            leaves them as they are.

    Raises:
        InvalidArgumentError: If it is none of these, holds no batch, or has a batch
            size already.
    """
    if not isinstance(data, tf.data.Dataset) and _holds_arrays(data):
        return Arrays(data, BATCH_SIZE if batch_size is None else batch_size, dtype)
    if batch_size is not None:
        raise InvalidArgumentError(
            "`batch_size` cuts arrays; all else comes in batches of its own.",
            got=f"batch_size={batch_size} with data={describe(data)}",
            hint="dataset.batch(...), or leave out batch_size",
        )
    if isinstance(data, tf.data.Dataset):
        return Dataset(data)
    if isinstance(data, tf.distribute.DistributedDataset):
        return Distributed(data)
    can_yield = callable(data) or isinstance(data, Iterable | keras.utils.PyDataset)
    if can_yield and not isinstance(data, tuple | Mapping | str):
        return Batches(data, dtype)
    raise InvalidArgumentError(
        "`data` must be arrays, a tf.data.Dataset, or an iterable of batches.",
        got=f"data={describe(data)}",
        hint="data=(x, y) with batch_size=32, or data=dataset.batch(32)",
    )


class Arrays(Source):
    """Rows of arrays, in another order in each epoch; the last batch may be smaller."""

    def __init__(self, data: Nest, batch_size: int, dtype: tf.DType | None) -> None:
        arrays = _as_arrays(data, "data", dtype)
        self._arrays = tf.nest.map_structure(tf.convert_to_tensor, arrays)
        self._size = batch_size
        self._count = _common_length(named_leaves(self._arrays, "data"))
        self._last = self.batches = -(-self._count // batch_size)
        self.spec = tf.TensorSpec([], tf.int64)
        self._numbers = _plain(tf.data.Dataset.range(self._last))
        self._order = tf.Variable(tf.range(self._count), trainable=False)

    def open(self, epoch: int, batch: int = 0) -> Any:
        """Shuffle, and return an iterator over numbers of batches."""
        order = np.random.default_rng([SEED, epoch]).permutation(self._count)
        self._order.assign(order.astype(np.int32))
        return iter(self._numbers.skip(batch) if batch else self._numbers)

    def batch(self, drawn: tf.Tensor) -> Nest:
        """Return the rows of a batch, by its number."""
        rows = self._rows(drawn)
        return tf.nest.map_structure(lambda a: tf.gather(a, rows), self._arrays)

    def row(self, drawn: tf.Tensor, index: int) -> str:
        """Return the number of the row in the user's arrays."""
        return f"row {int(self._rows(drawn)[index])} of the data"

    def example(self) -> Nest:
        """Return the first rows."""
        return tf.nest.map_structure(lambda a: a[: self._size], self._arrays)

    def fold(self, add: Callable[[Any, Any], Any], start: Any) -> Any:
        """Add up the batches in the order of the arrays."""

        def next_one(number: tf.Tensor, sums: Any) -> Any:
            return number + 1, add(sums, number)

        first, last = (tf.constant(i, tf.int64) for i in (0, self._last))
        return _loop(lambda number, _: number < last, next_one, (first, start))

    def __str__(self) -> str:
        """Return what the log says of it."""
        return f"{self._count} rows, {self._size} in a batch"

    def _rows(self, number: tf.Tensor) -> tf.Tensor:
        first = number * self._size
        return self._order[first : first + self._size]


class Dataset(Source):
    """A `tf.data.Dataset`: one iterator for each epoch, as a Python loop makes them."""

    def __init__(self, dataset: tf.data.Dataset[Any]) -> None:
        self.is_python = _may_change(dataset)
        self._dataset = _plain(dataset, is_ours=False) if self.is_python else dataset
        self.spec, self._opened = dataset.element_spec, 0
        count = int(dataset.cardinality())
        self.batches = count if count >= 0 else None
        self.is_endless = count == tf.data.INFINITE_CARDINALITY

    def open(self, epoch: int, batch: int = 0) -> Any:
        """Return the iterator of an epoch.

        A seeded data set orders its elements by how many iterators there were before.
        """
        while self._opened <= epoch:
            iterator = iter(self._dataset)
            self._opened += 1
        deque(itertools.islice(iterator, batch), maxlen=0)
        return iterator

    def example(self) -> Nest:
        """Return the first batch of an iterator of its own."""
        for batch in self._dataset:
            return batch
        raise _empty("a tf.data.Dataset without elements")

    def fold(self, add: Callable[[Any, Any], Any], start: Any) -> Any:
        """Add up the batches of a new iterator."""
        return _folded(self._dataset, add, start)

    def __str__(self) -> str:
        """Return what the log says of it."""
        return f"a data set of {_layout(self.spec)}"


class Distributed(Dataset):
    """What a strategy has distributed: each worker draws rows of its own.

    What the replicas of a worker draw becomes one batch, of which each takes a share.
    """

    is_own = True

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._opened = dataset, 0
        self.spec = dataset.element_spec
        self.is_endless = dataset.cardinality == tf.data.INFINITE_CARDINALITY

    def batch(self, drawn: Nest) -> Nest:
        """Return what this worker has drawn."""
        return tf.nest.map_structure(_joined, drawn)

    def example(self) -> Nest:
        """Return the first batch of an iterator of its own."""
        return self.batch(super().example())

    def fold(self, add: Callable[[Any, Any], Any], start: Any) -> Any:
        """Add up the batches of this worker, as each of its replicas does."""
        # Nothing but the data set itself can be gone through in a replica.
        variant = tf.nest.flatten(self._dataset, expand_composites=True)[0]
        spec = tf.nest.map_structure(_of_one, self.spec)
        return _folded(tf.data.experimental.from_variant(variant, spec), add, start)

    def __str__(self) -> str:
        """Return what the log says of it."""
        return "batches of each worker's own"


class Batches(Source):
    """Batches made by Python: an iterable, or a function that returns one.

    The first batch says what all look like: the same structure, dtypes and shapes, but
    for the first dimension.
    """

    is_python = True

    def __init__(self, data: Any, dtype: tf.DType | None) -> None:
        self._data, self._dtype, self._epoch = data, dtype, 0
        try:
            iterator = self._iterator()
        except TypeError:
            raise InvalidArgumentError(
                "A function given as `data` must return something to iterate over.",
                got=f"data={describe(data)}",
                hint="data=make, where make() returns an iterator over batches",
            ) from None
        self.is_repeatable = iterator is not data
        first = next(iterator, None)
        if first is None:
            raise _empty(f"data={describe(data)} yields nothing")
        self._batches: Iterator[Any] = itertools.chain([first], iterator)
        self._example = self._arrays(first)
        self.spec = tf.nest.map_structure(_spec, self._example)
        self.batches = len(data) if hasattr(data, "__len__") else None
        self._dataset = self._made(lambda: self._batches)

    def open(self, epoch: int, batch: int = 0) -> Any:
        """Return the iterator of an epoch; all before it is drawn, if it is not yet."""
        while self._epoch < epoch:
            deque(self._batches, maxlen=0)
            self._batches = self._iterator()
            self._epoch += 1
        deque(itertools.islice(self._batches, batch), maxlen=0)
        return iter(self._dataset)

    def example(self) -> Nest:
        """Return the first batch."""
        return tf.nest.map_structure(tf.convert_to_tensor, self._example)

    def fold(self, add: Callable[[Any, Any], Any], start: Any) -> Any:
        """Add up the batches, made anew."""
        return _folded(self._made(self._iterator), add, start)

    def __str__(self) -> str:
        """Return what the log says of it."""
        return f"batches of {_layout(self.spec)}"

    def _iterator(self) -> Iterator[Any]:
        data = self._data
        if isinstance(data, keras.utils.PyDataset):
            return _batches_of(data)
        return iter(data() if callable(data) else data)

    def _made(self, batches: Callable[[], Iterator[Any]]) -> tf.data.Dataset[Any]:
        """Return the data set of what an iterator yields."""

        def yielded() -> Iterator[Nest]:
            # TensorFlow would replace an error raised here by one of its own; so the
            # epoch ends, and the loop raises `error`.
            try:
                for batch in batches():
                    yield self._checked(self._arrays(batch))
            except Exception as error:  # a user's code may raise anything
                self.error = error

        made = tf.data.Dataset.from_generator(yielded, output_signature=self.spec)
        return _plain(made)

    def _arrays(self, batch: Nest) -> Nest:
        """Return a batch in arrays; a list of parts, as PyTorch has it, is a tuple."""
        if isinstance(batch, list) and not is_array_like(batch):
            batch = tuple(batch)
        return _as_arrays(batch, "batch", self._dtype)

    def _checked(self, batch: Nest) -> Nest:
        specs = tf.nest.map_structure(_spec, batch)
        if specs != self.spec:
            raise InvalidArgumentError(
                "All batches must look alike, but for their first dimension.",
                got=f"{_layout(specs)} after {_layout(self.spec)}",
                hint="pad them to one shape, or a tf.data.Dataset, whose element_spec "
                "may leave dimensions open",
            )
        return batch


def can_take(f: Callable[..., Any], count: int) -> bool:
    """Return whether `f` can be called with so many positional arguments."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # builtins and some callables have no signature
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def arguments_of(
    f: Callable[..., Any], before: int, example: Nest
) -> Callable[[Nest], tuple[Nest, ...]]:
    """Return the function from a batch to what `f` takes: its parts, or all as one.

    Args:
        f: The loss.
        before: How many arguments come before: 1 if it is a function of values.
        example: A batch, or its specs. A tuple is spread over positional parameters if
            there are as many.

    Raises:
        InvalidArgumentError: If `f` takes it neither way.
    """
    is_tuple = isinstance(example, tuple)
    if is_tuple and can_take(f, before + len(example)):
        return tuple
    if can_take(f, before + 1):
        return lambda batch: (batch,)
    point = "params, " if before else ""
    parts = f" or `loss({point}x, y)`" if is_tuple and len(example) > 1 else ""
    raise InvalidArgumentError(
        f"With `data`, the loss takes a batch: `loss({point}batch)`{parts}.",
        got=f"`{name_of(f)}{inspect.signature(f)}`, and {_layout(example)} as a batch",
        hint=f"a tuple of {len(example)} is spread over {len(example)} parameters"
        if is_tuple
        else f"lambda {point}batch: ...",
    )


def names_of_parts(f: Callable[..., Any], before: int, arguments: Nest) -> list[str]:
    """Return what the user calls each leaf of the arguments made of a batch."""
    names = parameter_names(f)(before + len(arguments))[before:]
    pairs = zip(names, arguments, strict=True)
    return [path for name, nest in pairs for path, _ in named_leaves(nest, name)]


def size_of(batch: Nest) -> tf.Tensor:
    """Return how many rows a batch has; what has no rows counts as one."""
    leaf = tf.nest.flatten(batch)[0]
    if isinstance(leaf, tf.SparseTensor):
        return tf.cast(leaf.dense_shape[0], tf.int32)
    if leaf.shape.rank == 0:
        return tf.constant(1)
    if leaf.shape[0] is not None:
        return tf.constant(leaf.shape[0])
    rows = leaf.nrows() if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf)[0]
    return tf.cast(rows, tf.int32)


def require_rows(arguments: tuple[Nest, ...]) -> None:
    """Refuse a batch whose parts cannot be cut between replicas: of other lengths."""
    leaves = [leaf for leaf in tf.nest.flatten(arguments) if leaf.shape.rank != 0]
    counts = [int(size_of(leaf)) for leaf in leaves]
    if len(set(counts)) > 1:
        raise InvalidArgumentError(
            "Under a strategy, all parts of a batch must have the same number of rows: "
            "each replica takes a share of them.",
            got=f"parts of {', '.join(map(str, counts))} rows",
            hint="one row for each example in every part; what all rows share as a "
            "variable or constant",
        )


def rows_of(arguments: tuple[Nest, ...]) -> tf.Tensor:
    """Return how many rows all parts of a batch have, to be cut between replicas.

    A part without a dimension has none; a batch of nothing else is one row.
    """
    leaves = [x for x in tf.nest.flatten(arguments) if x.shape.rank != 0]
    counts = [size_of(leaf) for leaf in leaves]
    if not counts:
        return tf.constant(1)
    known = [tf.get_static_value(count) for count in counts]
    if known[0] is not None and all(count == known[0] for count in known):
        return counts[0]
    others = [
        tf.debugging.assert_equal(
            counts[0], count, "All parts of a batch must have the same number of rows."
        )
        for count in counts[1:]
    ]
    with tf.control_dependencies([op for op in others if op is not None]):
        return tf.identity(counts[0])


def require_batch(has_one: bool) -> None:
    """Refuse an empty data set."""
    if not has_one:
        raise _empty("a tf.data.Dataset without elements")


def _empty(got: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "`data` must hold at least one batch.",
        got=got,
        hint="look at next(iter(data)): a filter, a path or a used-up generator?",
    )


def _holds_arrays(data: Any) -> bool:
    if is_array_like(data):
        return True
    if isinstance(data, tuple | Mapping):
        children = data.values() if isinstance(data, Mapping) else data
        return bool(data) and all(map(_holds_arrays, children))
    is_array = isinstance(data, np.ndarray) or tf.is_tensor(data)
    return is_array or hasattr(data, "__array__")


def _as_arrays(data: Nest, name: str, dtype: tf.DType | None) -> Nest:
    """Return data in arrays, those of NumPy's floats in the dtype, if one is given."""
    return map_leaves(functools.partial(_as_array, dtype=dtype), data, name)


def _as_array(leaf: Any, name: str, dtype: tf.DType | None) -> Any:
    if isinstance(leaf, tf.Tensor):
        return leaf
    try:
        array = np.asarray(leaf)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype == object:
        raise InvalidArgumentError(
            "`data` must be made of arrays.",
            got=f"`{name}` is {describe(leaf)}",
            hint="numpy.asarray(..., dtype=...) of it; rows of one length",
        )
    if array.dtype.kind != "f":
        return array
    if dtype is None:  # plain numbers are of float32 then
        is_plain = is_number(leaf) or is_array_like(leaf)
        return array.astype(np.float32) if is_plain else array
    return array.astype(dtype.as_numpy_dtype)


def _may_change(dataset: Any) -> bool:
    """Return whether Python code, or a trainable variable, takes part in a data set."""
    graphs = [function.function.graph for function in dataset._functions()]
    # `graph.variables` fails if one of them is gone.
    read = [reference() for graph in graphs for reference in graph._weak_variables]
    return (
        any(variable is not None and variable.trainable for variable in read)
        or any(has(operations_of(graph), ["PyFunc"]) for graph in graphs)
        or any(map(_may_change, dataset._inputs()))
    )


def _plain(
    dataset: tf.data.Dataset[Any], *, is_ours: bool = True
) -> tf.data.Dataset[Any]:
    """Return a data set that draws no element before it is asked for.

    One of ours is not tuned either: threads cost more than they could save here.
    """
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    if is_ours:
        options.autotune.enabled = False
    return dataset.with_options(options)


def _folded(
    dataset: tf.data.Dataset[Any], add: Callable[[Any, Any], Any], start: Any
) -> Any:
    """Return `Source.fold` over a data set."""
    # `Dataset.reduce` takes several times as long.
    iterator: Any = iter(dataset)

    def next_one(_: tf.Tensor, sums: Any) -> Any:
        ahead = iterator.get_next_as_optional()
        has_one = ahead.has_value()
        return has_one, tf.cond(
            has_one, lambda: add(sums, ahead.get_value()), lambda: sums
        )

    return _loop(lambda goes_on, _: goes_on, next_one, (True, start))


def _loop(goes_on: Callable[..., Any], body: Callable[..., Any], start: Any) -> Any:
    return tf.while_loop(goes_on, body, start, parallel_iterations=1)[1]


def _of_one(spec: Any) -> Any:
    """Return the spec of what one of a worker's replicas draws, with rows left open."""
    spec = getattr(spec, "_value_specs", (spec,))[0]
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
        return spec
    return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)


def _joined(leaf: Any) -> Any:
    """Return the rows that the replicas of a worker have drawn, one after the other."""
    if not isinstance(leaf, tf.distribute.DistributedValues):
        return leaf
    parts = leaf.values
    if isinstance(parts[0], tf.SparseTensor):
        return tf.sparse.concat(0, parts)
    return parts[0] if parts[0].shape.rank == 0 else tf.concat(parts, 0)


def _common_length(named: list[tuple[str, tf.Tensor]]) -> int:
    lengths = {name: leaf.shape[0] if leaf.shape.rank else None for name, leaf in named}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        shapes = (f"`{name}` of shape {tuple(leaf.shape)}" for name, leaf in named)
        raise InvalidArgumentError(
            "Arrays must have the same number of rows: the first dimension is cut.",
            got=", ".join(shapes),
            hint="one row for each example in every array",
        )
    count = next(iter(lengths.values()))
    if not count:
        raise _empty("arrays of 0 rows")
    return int(count)


def _spec(leaf: Any) -> tf.TensorSpec:
    shape = [None, *leaf.shape[1:]] if len(leaf.shape) else []
    return tf.TensorSpec(shape, leaf.dtype)


def _layout(batch: Nest) -> str:
    """Return the shapes in a batch, or in its specs."""
    leaves = named_leaves(batch, "batch")
    return ", ".join(f"{name} {leaf.shape} {leaf.dtype.name}" for name, leaf in leaves)


def _batches_of(data: Any) -> Iterator[Any]:
    for index in range(len(data)):
        yield data[index]
    data.on_epoch_end()
