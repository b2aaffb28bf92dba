"""A `tf.distribute` strategy, as a problem and a run need it.

Only the evaluation of a batch is distributed: each replica evaluates its share of the
rows, and one all-reduce for each dtype adds the shares up. All else (optimizers,
methods, rules, loops) stands outside of `strategy.run`, on plain tensors that are equal
on all workers to the last bit. Without a strategy there is one replica, which runs the
same code as it is.

References:
    Li et al. (2020), PyTorch Distributed: experiences on accelerating data parallel
    training, section 3: gradients of shares, packed and added up by all-reduce.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.nested import Nest

_OWN_TIMES = (
    "its workers move the variables at times of their own, so that no step has a "
    "gradient of its own"
)

REFUSED = {
    "ParameterServerStrategy": _OWN_TIMES,
    "ParameterServerStrategyV2": _OWN_TIMES,
    "CentralStorageStrategy": "its variables are read and written from many devices "
    "at once",
}
"""Strategies that a run refuses, and why."""

LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)
"""What TensorFlow raises where an all-reduce fails."""


class Replicas:
    """The replicas of a strategy: how many, and what they add up.

    Attributes:
        strategy: The strategy; None for one replica.
        count: How many replicas evaluate a share each.
        is_clustered: Whether they are in several processes.
        is_chief: Whether this process writes logs and checkpoints.
    """

    def __init__(self, strategy: Any = None) -> None:
        self.strategy = strategy
        self.count = 1 if strategy is None else strategy.num_replicas_in_sync
        resolver = None if strategy is None else strategy.cluster_resolver
        task = None if resolver is None or self.count == 1 else resolver.task_type
        self.is_clustered = bool(task)
        self.is_chief = not task or _is_chief(resolver)
        self._gathering: Any = None

    def run(self, function: Callable[..., Any], *arguments: Nest) -> Any:
        """Return what `function` returns in each replica: the same in all of them."""
        return self.run_on_each(function, *arguments)[0]

    def run_on_each(self, function: Callable[..., Any], *arguments: Nest) -> list[Any]:
        """Return what `function` returns on each device of this process.

        It is called in a thread for each, with the context variables of this one.
        """
        if self.count == 1:
            return [function(*arguments)]
        context = contextvars.copy_context()

        def replica(*given: Nest) -> Any:
            return context.copy().run(function, *given)

        answers = self.strategy.run(replica, args=arguments)
        local = map(self.strategy.experimental_local_results, tf.nest.flatten(answers))
        pairs = zip(*local, strict=True)
        return [tf.nest.pack_sequence_as(answers, leaves) for leaves in pairs]

    def share(
        self, batch: Nest, rows: Any, *, are_own: bool = False
    ) -> tuple[Nest, tf.Tensor]:
        """Return this replica's rows of a batch, and how many those are.

        They are those from n r / R to n (r + 1) / R: any n will do, no row is in two
        shares, and a share may be empty. What has no rows is in all of them.

        Args:
            batch: The batch of all workers.
            rows: How many it has.
            are_own: Whether it is of this worker alone, shared by its own replicas.
        """
        index: Any = self._index()
        known = [tf.get_static_value(each) for each in (rows, index)]
        if None not in known and known[0] >= self.count:  # its shapes are known, too
            rows, index = map(int, known)
        count = self.count
        if are_own:
            count = len(self.strategy.extended.worker_devices)
            index %= count
        first, last = (rows * i // count for i in (index, index + 1))

        def part(leaf: Any) -> Any:
            if isinstance(leaf, tf.SparseTensor):
                start, size = (tf.cast(i, tf.int64) for i in (first, last - first))
                shape = leaf.dense_shape[1:]
                starts: Any = [[start], 0 * shape]
                sizes: Any = [[size], shape]
                return tf.sparse.slice(leaf, tf.concat(starts, 0), tf.concat(sizes, 0))
            return leaf if leaf.shape.rank == 0 else leaf[first:last]

        return tf.nest.map_structure(part, batch), tf.convert_to_tensor(last - first)

    def total(self, tensors: Sequence[tf.Tensor], share: Any = None) -> list[tf.Tensor]:
        """Return the sums over all replicas: one all-reduce for each dtype.

        The shapes must be the same in each call: a collective of TensorFlow is bound to
        one.

        Args:
            tensors: What this replica has computed.
            share: Of how many of all rows; of none, what is not finite counts as 0.
        """
        if self.count == 1:
            return list(tensors)
        sums: list[Any] = [None] * len(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = tf.concat([tf.reshape(tensors[i], [-1]) for i in places], 0)
            if dtype.is_floating:
                flat = without_nan(flat, share)
            # Made in the replica: of a tensor from outside, `all_reduce` returns one
            # replica's part under MirroredStrategy, without a word.
            flat = _context().all_reduce("SUM", tf.identity(flat))
            sizes = [tensors[i].shape.num_elements() for i in places]
            for i, part in zip(places, tf.split(flat, sizes), strict=True):
                sums[i] = tf.reshape(part, tensors[i].shape)
        return sums

    def stacked(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return zeros of shape `[R, ...]` but for the tensor in this replica's row.

        Their total holds the tensors of all replicas.
        """
        shape = [self.count, *[1] * len(tensor.shape)]
        mine = tf.one_hot(self._index() if self.count > 1 else 0, self.count)
        is_mine = tf.reshape(mine > 0, shape)
        return tf.where(is_mine, tensor[None], tf.zeros_like(tensor)[None])

    @contextlib.contextmanager
    def own_masks(self, seeds: Sequence[tf.Variable]) -> Iterator[None]:
        """Let each replica draw from seeds of its own within the block.

        Keras's seeds are equal in all replicas, which would drop the same units.
        """
        if self.count == 1:
            yield
            return
        own = tf.stack([self._index(), 0])
        for seed in seeds:
            seed.assign_add(tf.cast(own, seed.dtype))
        yield
        for seed in seeds:
            seed.assign_sub(tf.cast(own, seed.dtype))

    def gather(self, numbers: Sequence[float]) -> np.ndarray[Any, Any]:
        """Return the numbers of all replicas, shape `[R, n]`; from outside of a trace.

        All workers have to call it, with as many numbers. It is a barrier, too.
        """
        if not self.is_clustered:
            return np.array([numbers], np.float64)
        if self._gathering is None:

            def one(mine: tf.Tensor) -> Any:
                return self.total([self.stacked(mine)])[0]

            gathered = functools.partial(self.run, one)
            self._gathering = tf.function(gathered, autograph=False)
        return np.asarray(self._gathering(tf.constant(numbers, tf.float64)))

    def require_same(self, batch: Nest) -> None:
        """Refuse a first batch that is another one in another worker.

        Each worker takes its share of what it draws: of different batches, some rows
        would be used twice and others never.

        Raises:
            InvalidArgumentError: If it is. All workers have to call it.
        """
        if not self.is_clustered:
            return
        leaves = tf.nest.flatten(batch, expand_composites=True)
        sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in leaves]
        own = zlib.crc32(np.array(sums, np.uint32).tobytes())
        found = self.gather([own])[:, 0]
        if np.any(found != found[0]):
            raise InvalidArgumentError(
                "All workers must draw the same batches, of which each takes its share "
                "of the rows.",
                got="first batches that differ between workers",
                hint="shuffle(..., seed=1), a seed for what draws at random in the "
                "data, and files in one order; or arrays, which are shuffled by one "
                "seed",
            )

    def _index(self) -> tf.Tensor:
        return _context().replica_id_in_sync_group


def without_nan(tensor: tf.Tensor, share: Any) -> tf.Tensor:
    """Return a sum over a share of the rows, with 0 for what no rows have made NaN."""
    if share is None or tf.get_static_value(share):
        return tensor
    is_none = (share == 0) & ~tf.math.is_finite(tensor)
    return tf.where(is_none, tf.zeros_like(tensor), tensor)


ONE = Replicas()
"""No strategy."""


def replicas_of(variables: Sequence[Any]) -> Replicas:
    """Return the replicas that variables, which are moved, are mirrored on.

    Raises:
        InvalidArgumentError: If they are of several strategies, or of one under which
            no step is well defined.
    """
    found = [strategy_of(variable) for variable in variables]
    if not found or all(strategy is None for strategy in found):
        return ONE
    if any(strategy is not found[0] for strategy in found):
        pairs = zip(variables, found, strict=True)
        one_of_each = {id(strategy): (v.name, _name(strategy)) for v, strategy in pairs}
        raise InvalidArgumentError(
            "All variables that are moved must be of one strategy.",
            got=" and ".join(f"{n!r} of {kind}" for n, kind in one_of_each.values()),
            hint="all of them made in one strategy.scope()",
        )
    return Replicas(checked(found[0]))


def checked(strategy: Any) -> Any:
    """Return a strategy; refuse those under which no step is well defined."""
    reason = REFUSED.get(_name(strategy))
    if reason is not None:
        raise InvalidArgumentError(
            "A run needs replicas that take each step together.",
            got=f"{_name(strategy)}: {reason}",
            hint="tf.distribute.MultiWorkerMirroredStrategy, or MirroredStrategy",
        )
    return strategy


def is_one_of_several() -> bool:
    """Return whether a strategy has connected this process to others."""
    names = (device.name for device in tf.config.list_logical_devices())
    return len({name.partition("/device:")[0] for name in names}) > 1


def scope_of(variables: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Return the scope that variables were made in, for others that go with them."""
    strategy = next(filter(None, map(strategy_of, variables)), None)
    if strategy is tf.distribute.get_strategy() or not variables:
        return contextlib.nullcontext()
    return out_of_scope() if strategy is None else strategy.scope()


def strategy_of(variable: Any) -> Any:
    """Return the strategy that a variable was made under; None for none."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    # A copy of a mirrored variable, as a tape or a graph knows it, has the other name.
    of_whole = getattr(variable, "distribute_strategy", None)
    return of_whole or getattr(variable, "_distribute_strategy", None)


def whole(variables: Sequence[tf.Variable]) -> list[tf.Variable]:
    """Return each variable once, with the mirrored variable for one of its copies."""
    found: dict[int, tf.Variable] = {}
    for variable in variables:
        strategy = strategy_of(variable)
        if strategy is not None:
            variable = strategy.extended.value_container(variable)
        found[id(variable)] = variable
    return list(found.values())


_OF_SCOPES = ("_distribution_strategy_stack", "_variable_creator_stack")

_left: contextvars.ContextVar[Any] = contextvars.ContextVar("left", default=None)


def left_scope() -> Replicas:
    """Return the replicas of the scope that `out_of_scope` has left, if it has."""
    return ONE if _left.get() is None else Replicas(_left.get())


@contextlib.contextmanager
def out_of_scope() -> Iterator[None]:
    """Leave the scope of a strategy, if one is open, within the block.

    Optimizers refuse to move variables in a scope, and so does a trace made in it.
    TensorFlow keeps the open scopes, and how variables are made in them, with the
    default graph of the thread. It has no public name for leaving them, and another
    thread would be out of Ctrl-C's reach.
    """
    if not (tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context()):
        yield
        return
    token = _left.set(checked(tf.distribute.get_strategy()))
    graph: Any = tf.compat.v1.get_default_graph()
    kept = {name: getattr(graph, name) for name in _OF_SCOPES}
    for name in _OF_SCOPES:
        setattr(graph, name, [])
    try:
        yield
    finally:
        for name, stack in kept.items():
            setattr(graph, name, stack)
        _left.reset(token)


class Copies:
    """The gradient on each device of this process, for the copy of `moved` there.

    Replicas add up what they have computed, so that each has the whole gradient. An
    optimizer is given that of the first one, and TensorFlow would send it to all
    others. Variables hold the others: what a function returns, and what a branch is
    handed, goes through the first device.
    """

    def __init__(self, moved: Sequence[tf.Variable] = ()) -> None:
        self._held: list[dict[str, tf.Variable]] = []
        for variable in moved:
            each = strategy_of(variable).experimental_local_results(variable)
            self._held.append({v.device: _zeros(v) for v in each[1:]})

    def keep(self, gradients: Sequence[Sequence[tf.Tensor]]) -> None:
        """Hold the gradients of a batch, within the function that computes them."""
        for held, *leaves in zip(self._held, *gradients, strict=False):
            for variable, leaf in zip(held.values(), leaves, strict=True):
                variable.assign(leaf, read_value=False)

    @contextlib.contextmanager
    def beside(
        self, optimizer: Any, gradient: Sequence[Any]
    ) -> Iterator[Sequence[Any]]:
        """Let an optimizer move each copy of a variable by the gradient beside it.

        What it has changed before, as by clipping, comes from the first device.

        Yields:
            The gradient on the first device, as the optimizer is to be given it.
        """
        is_keras = isinstance(optimizer, keras.optimizers.Optimizer)
        if not (is_keras and any(self._held)):
            yield gradient
            return
        given = [tf.identity(leaf) for leaf in gradient]  # in this graph
        held = {
            id(leaf): others for leaf, others in zip(given, self._held, strict=True)
        }
        update = optimizer.update_step

        def update_step(gradient: tf.Tensor, variable: Any, rate: Any) -> Any:
            origin = gradient
            while id(origin) not in held and "Identity" in origin.op.type:
                origin = origin.op.inputs[origin.value_index]
            other = held.get(id(origin), {}).get(variable.device)
            own = gradient if other is None else other.read_value()
            return update(own, variable, rate)

        optimizer.update_step = update_step
        try:
            yield given
        finally:
            del optimizer.update_step


def _zeros(like: tf.Variable) -> tf.Variable:
    with tf.device(like.device):
        return tf.Variable(tf.zeros(like.shape, like.dtype), trainable=False)


def lost_worker(error: BaseException, replicas: Replicas) -> RunError | None:
    """Return what to say where an all-reduce failed; None of any other error."""
    if not replicas.is_clustered or not isinstance(error, LOST):
        return None
    return RunError(
        "All workers of a run have to live until it ends.",
        got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
        hint="end all workers and start them again with the same TF_CONFIG; with "
        "`checkpoint` they go on from the last one that the chief wrote",
    )


def _is_chief(resolver: Any) -> bool:
    """Return whether this process is the first of its cluster."""
    first = "chief" if resolver.cluster_spec().as_dict().get("chief") else "worker"
    return resolver.task_type == first and resolver.task_id == 0


def _context() -> Any:
    return tf.distribute.get_replica_context()


def _name(strategy: Any) -> str:
    return "no strategy" if strategy is None else type(strategy).__name__
