"""What a user writes: mypy (strict) reads this file in `make check`, pytest runs it."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad import errors, problems


def parabola(x: tf.Tensor) -> tf.Tensor:
    return x**2 + x - 1


def bowl(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(x**2)


def test_derivatives_of_values() -> None:
    x = tf.constant([1.0, 2.0])
    value, slope = tfgrad.value_and_grad(bowl)(x)
    _, pushed = tfgrad.jvp(bowl, (x,), (x,))
    _, pull = tfgrad.vjp(bowl, x)

    assert float(tfgrad.derivative(parabola)(3.0)) == 7.0
    assert float(tfgrad.grad(parabola)(3.0)) == 7.0
    assert float(value) == 5.0
    np.testing.assert_allclose(slope, [2.0, 4.0])
    np.testing.assert_allclose(tfgrad.jacobian(bowl)(x), [2.0, 4.0])
    np.testing.assert_allclose(tfgrad.hessian(bowl)(x), 2 * np.eye(2))
    np.testing.assert_allclose(tfgrad.hvp(bowl)(x, x), [2.0, 4.0])
    assert float(pushed) == 10.0
    np.testing.assert_allclose(pull(1.0)[0], [2.0, 4.0])


def test_variables_and_models() -> None:
    variable = tf.Variable(tf.constant(3.0))
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    batch = tf.ones([4, 2])

    assert float(tfgrad.grad(lambda: variable**2, wrt=variable)()) == 6.0
    value, slopes = tfgrad.value_and_grad(
        lambda: tf.reduce_mean(model(batch) ** 2), wrt=model
    )()
    assert float(value) >= 0.0
    assert len(slopes) == 2


def test_trust() -> None:
    value, error = tfgrad.finite_difference(parabola, 3.0)
    check: tfgrad.GradCheck = tfgrad.check_grads(problems.beale, np.array([1.0, 1.0]))
    status: list[str] = [f.status for f in tfgrad.explain(parabola, 3.0).findings]

    assert abs(float(value) - 7.0) <= float(error) + 1e-3
    assert check
    assert status == ["connected"]
    with pytest.raises(errors.NoGradientError, match=r"tf\.round"):
        tfgrad.grad(tf.round)(1.2)


def test_down_and_watched(tmp_path: Path) -> None:
    result: tfgrad.OptimizeResult = tfgrad.minimize(
        bowl, np.array([3.0, 2.0]), gtol=1e-8, log=tmp_path / "bowl"
    )
    last = 0
    for state in tfgrad.descend(parabola, 3.0, method="sgd", steps=3):
        last = state.step
    with tfgrad.Run(tmp_path / "mine", {"rate": 0.1}) as run:
        run.log(0, loss=1.0)
        run.log_history({"loss": [0.5, 0.25]}, [1, 2])

    assert result.success
    assert result.directory is not None
    assert last == 3
    assert len(tfgrad.load_run(run.directory)) == 3
    assert tfgrad.load_runs(tmp_path)["run"].nunique() == 2
    tfgrad.plot_path(bowl, result).savefig(tmp_path / "path.png")
    tfgrad.plot_runs(tmp_path, "loss").savefig(tmp_path / "runs.png")
    with tfgrad.show(tmp_path, pin="loss") as board:
        url: str = board.url
    assert url.startswith("http://127.0.0.1")


def test_fitted() -> None:
    t = np.array([0.0, 1.0, 2.0, 3.0])

    def misfit(line: dict[str, tf.Tensor]) -> tf.Tensor:
        return line["rise"] * t + line["start"] - 2 * t - 1

    start = {"rise": np.float64(0.0), "start": np.float64(0.0)}
    fit: tfgrad.LeastSquaresResult = tfgrad.least_squares(misfit, start)

    assert round(float(fit.x["rise"]), 9) == 2.0


def test_many_at_once() -> None:
    t = np.array([0.0, 1.0, 2.0, 3.0])

    def misfit(line: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return line[0] * t + line[1] - y

    starts = np.array([[3.0, 2.0], [-1.0, 4.0]])
    runs: tfgrad.ManyResult = tfgrad.minimize_many(bowl, starts)
    lines = np.stack([2 * t + 1, t - 1])
    fits: tfgrad.ManyFitsResult = tfgrad.least_squares_many(misfit, starts, lines)

    assert runs.success.all()
    np.testing.assert_allclose(fits.x, [[2.0, 1.0], [1.0, -1.0]], atol=1e-9)


def test_a_solution_and_its_slope() -> None:
    def ridge(w: tf.Tensor, penalty: tf.Tensor) -> tf.Tensor:
        return (w - 3.0) ** 2 + penalty * w**2

    slope = tfgrad.grad(lambda penalty: tfgrad.solution(ridge, 0.0, penalty))(1.0)

    np.testing.assert_allclose(slope, -0.75, rtol=1e-4)


def test_a_step_of_training_and_the_watch_over_a_fit() -> None:
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    x, y = tf.ones([8, 2]), tf.zeros([8, 1])

    def loss(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean((model(x) - y) ** 2)

    step = tfgrad.train_step(loss, wrt=model, optimizer="adam", learning_rate=0.01)
    before, after = float(step(x, y)), float(step(x, y))
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0, callbacks=[tfgrad.ExplainNaN()])

    assert after < before


def test_every_public_name_is_used_above() -> None:
    text = Path(__file__).read_text(encoding="utf-8")

    assert [name for name in tfgrad.__all__ if f"tfgrad.{name}" not in text] == []
