"""Every Keras optimizer in the compiled loop against the same one stepped by hand."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.solvers import Form
from tfgrad.optimize.solvers.optimizer import OptimizerForms

STEPS = 12
START = np.array([[1.5, -2.0], [0.5, 3.0]], np.float32)
SCALES = np.array([[1.0, 2.0], [0.5, 1.5]], np.float32)

schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.7)
WRAPPERS = {"LossScaleOptimizer", "MultiOptimizer", "Optimizer", "OptimizerMap"}
CLASSES = [
    kind
    for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass)
    if name not in WRAPPERS
]
OPTIONS = {
    "plain": {},
    "schedule": {"learning_rate": schedule},
    "clipnorm": {"learning_rate": 0.05, "clipnorm": 0.5},
    "global_clipnorm": {"learning_rate": 0.05, "global_clipnorm": 0.7},
    "clipvalue": {"learning_rate": 0.05, "clipvalue": 0.3},
    "ema": {"learning_rate": 0.05, "use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite": {
        "learning_rate": 0.05,
        "use_ema": True,
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": 5,
    },
    "accumulation": {"learning_rate": 0.05, "gradient_accumulation_steps": 3},
    "weight_decay": {"learning_rate": 0.05, "weight_decay": 0.01},
}


def loss(w, b):
    return tf.reduce_sum(SCALES * tf.square(w)) + tf.reduce_sum(tf.sin(w) * b) + b**2


def by_hand(optimizer):
    w, b = keras.Variable(START, name="w"), keras.Variable(0.3, name="b")
    optimizer.build([w, b])
    values = []
    for step in range(STEPS + 1):
        with tf.GradientTape() as tape:
            value = loss(w, b)
            scaled = optimizer.scale_loss(value)
        values.append(float(value))
        if step < STEPS:
            gradients = tape.gradient(scaled, [w.value, b.value])
            optimizer.apply_gradients(zip(gradients, [w, b], strict=True))
    if getattr(optimizer, "inner_optimizer", optimizer).use_ema:
        optimizer.finalize_variable_values([w, b])
    return np.array(values), w.numpy(), b.numpy()


def compiled(optimizer, monkeypatch, form):
    monkeypatch.setattr(OptimizerForms, "form", lambda *_: Form(form))
    w, b = keras.Variable(START, name="w"), keras.Variable(0.3, name="b")
    result = tfgrad.minimize(
        lambda: loss(w, b), wrt=[w, b], method=optimizer, steps=STEPS
    )
    return result.history["fun"], w.numpy(), b.numpy()


def agree(ours, theirs):
    # 12 steps of float32 rounding, amplified by optimizers that divide by moments.
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["calls", "graph", "xla"])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_optimizer_class_equals_its_eager_loop(kind, form, monkeypatch):
    agree(compiled(kind(), monkeypatch, form), by_hand(kind()))


@pytest.mark.parametrize(
    ("kind", "form"),
    [(keras.optimizers.SGD, "xla"), (keras.optimizers.Adam, "graph")],
    ids=["SGD-xla", "Adam-graph"],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_equals_its_eager_loop(kind, options, form, monkeypatch):
    ours = compiled(kind(**options), monkeypatch, form)

    agree(ours, by_hand(kind(**options)))


@pytest.mark.parametrize("form", ["calls", "graph", "xla"])
def test_a_loss_scale_changes_nothing_but_the_scale(form, monkeypatch):
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.05), initial_scale=2.0**10, dynamic_growth_steps=4
    )

    agree(
        compiled(scaled, monkeypatch, form),
        by_hand(keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.05), initial_scale=2.0**10, dynamic_growth_steps=4
        )),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["calls", "graph"])
def test_several_optimizers_for_several_variables(form, monkeypatch):
    def several():
        sgd, adam = keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.1)
        chosen = keras.optimizers.OptimizerMap(sgd, {"w": adam})
        return keras.optimizers.MultiOptimizer(chosen)

    agree(compiled(several(), monkeypatch, form), by_hand(several()))


def test_every_stand_alone_optimizer_has_a_name():
    from tfgrad.optimize.methods.keras_optimizer import optimizer_names

    assert set(optimizer_names().values()) == set(CLASSES)
    assert {"sgd", "adam", "adamw", "lion", "muon"} <= optimizer_names().keys()


def test_two_runs_with_one_instance_share_no_moments():
    optimizer = keras.optimizers.Adam(0.1)
    runs = [
        tfgrad.minimize(lambda x: (x - 1) ** 2, 3.0, method=optimizer, steps=5)
        for _ in range(2)
    ]

    assert np.array_equal(runs[0].history["x"], runs[1].history["x"])
    assert not optimizer.built


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_an_instance_that_is_bound_to_other_variables_is_refused(kind):
    optimizer = getattr(keras.optimizers, kind)(0.1)
    bound, other = tf.Variable(1.0), tf.Variable(3.0)
    optimizer.build([bound])

    with pytest.raises(InvalidArgumentError, match="built for others"):
        tfgrad.minimize(lambda: other**2, wrt=other, method=optimizer, steps=5)
    with pytest.raises(InvalidArgumentError, match="built for others"):
        tfgrad.minimize(lambda x: x**2, 3.0, method=optimizer, steps=5)

    assert (float(bound), float(other)) == (1.0, 3.0)
    result = tfgrad.minimize(lambda: bound**2, wrt=bound, method=optimizer, steps=5)
    assert result.nit == 5
    assert int(optimizer.iterations) == 0
