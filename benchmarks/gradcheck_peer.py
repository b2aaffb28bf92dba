"""Run one gradient checker over all cases and print its verdicts as JSON.

    python gradcheck_peer.py tfgrad|tensorflow|jax|torch float32|float64

One checker per process: importing several of these frameworks into one crashes it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
from gradcheck_cases import Case, cases, is_wrong

Verdicts = Iterator[tuple[Case, str]]


def tensorflow_module() -> Any:
    import tensorflow as tf

    class Module:
        sum, sqrt, exp, sin, tanh = tf.reduce_sum, tf.sqrt, tf.exp, tf.sin, tf.tanh
        log, sigmoid, softplus = tf.math.log, tf.sigmoid, tf.nn.softplus
        logsumexp, matvec = tf.reduce_logsumexp, tf.linalg.matvec

        @staticmethod
        def array(values: Any, like: Any) -> Any:
            return tf.constant(values, like.dtype)

    return Module


def tensorflow_cases(dtype: str) -> Iterator[tuple[Case, Any, Any]]:
    """Yield case, function and point, the bugs as a tf.custom_gradient."""
    import tensorflow as tf

    m = tensorflow_module()

    def gradient_of(case: Case, x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = case.call(m, x)
        return tape.gradient(value, x)

    def spoiled(case: Case) -> Callable[[Any], Any]:
        @tf.custom_gradient
        def function(x: Any) -> Any:
            def gradient(dy: Any) -> Any:
                return dy * tf.constant(case.spoil(gradient_of(case, x).numpy()))

            return case.call(m, x), gradient

        return function

    for case in cases():
        x = tf.constant(case.point, dtype)
        right = gradient_of(case, x).numpy()
        if not case.bug:
            yield case, lambda x, case=case: case.call(m, x), x
        elif is_wrong(right, case.spoil(right)):
            yield case, spoiled(case), x


def tfgrad(dtype: str) -> Verdicts:
    import tfgrad as library

    for case, function, x in tensorflow_cases(dtype):
        report = library.check_grads(
            function, x, order=1, modes=("reverse",), raises=False
        )
        yield case, report.checks[0].verdict


def tensorflow(dtype: str) -> Verdicts:
    """tf.test.compute_gradient with the limit most of TensorFlow's own tests set."""
    import tensorflow as tf

    for case, function, x in tensorflow_cases(dtype):
        (theory,), (numbers,) = tf.test.compute_gradient(function, [x])
        error = np.max(np.abs(theory - numbers))
        yield case, "pass" if error <= 1e-3 else "fail"


def jax(dtype: str) -> Verdicts:
    import jax
    import jax.numpy as jnp
    from jax.test_util import check_grads

    jax.config.update("jax_enable_x64", True)

    class Module:
        sum, sqrt, exp, sin = jnp.sum, jnp.sqrt, jnp.exp, jnp.sin
        tanh, log, matvec = jnp.tanh, jnp.log, jnp.matmul
        sigmoid, softplus = jax.nn.sigmoid, jax.nn.softplus
        logsumexp = jax.nn.logsumexp

        @staticmethod
        def array(values: Any, like: Any) -> Any:
            return jnp.array(values, like.dtype)

    def spoiled(case: Case, wrong: Any) -> Callable[[Any], Any]:
        @jax.custom_vjp
        def function(x: Any) -> Any:
            return case.call(Module, x)

        function.defvjp(lambda x: (function(x), None), lambda _, dy: (dy * wrong,))
        return function

    for case in cases():
        x = jnp.array(case.point, dtype)
        right = np.asarray(jax.grad(lambda x, case=case: case.call(Module, x))(x))
        wrong = case.spoil(right)
        if case.bug and not is_wrong(right, wrong):
            continue
        function = (
            spoiled(case, jnp.array(wrong))
            if case.bug
            else lambda x, case=case: case.call(Module, x)
        )
        try:
            check_grads(function, (x,), order=1, modes=("rev",))
        except AssertionError:
            yield case, "fail"
        else:
            yield case, "pass"


def torch(dtype: str) -> Verdicts:
    import torch

    class Module:
        sum, sqrt, exp, sin = torch.sum, torch.sqrt, torch.exp, torch.sin
        tanh, log, matvec = torch.tanh, torch.log, torch.mv
        sigmoid = torch.sigmoid
        softplus = torch.nn.functional.softplus

        @staticmethod
        def logsumexp(x: Any) -> Any:
            return torch.logsumexp(x, 0)

        @staticmethod
        def array(values: Any, like: Any) -> Any:
            return torch.tensor(values, dtype=like.dtype)

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, case: Case, wrong: Any) -> Any:
            context.wrong = wrong
            return case.call(Module, x.detach())

        @staticmethod
        def backward(context: Any, dy: Any) -> Any:
            return dy * context.wrong, None, None

    for case in cases():
        x = torch.tensor(case.point, dtype=getattr(torch, dtype), requires_grad=True)
        (right,) = torch.autograd.grad(case.call(Module, x), x)
        wrong = case.spoil(right.numpy())
        if case.bug and not is_wrong(right.numpy(), wrong):
            continue

        def function(x: Any, case: Case = case, wrong: Any = wrong) -> Any:
            if case.bug:
                return Spoiled.apply(x, case, torch.from_numpy(wrong))
            return case.call(Module, x)

        right_or_not = torch.autograd.gradcheck(function, x, raise_exception=False)
        yield case, "pass" if right_or_not else "fail"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch warns that float32 is too coarse for it
    checker, dtype = sys.argv[1:]
    verdicts = [(case.bug, verdict) for case, verdict in globals()[checker](dtype)]
    print(json.dumps(verdicts))
