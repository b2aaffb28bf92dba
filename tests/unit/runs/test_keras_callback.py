import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.run import Run

X = np.random.default_rng(0).random([32, 4])
Y = X.sum(axis=1, keepdims=True)


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, name="dense")], name="net")
    model.compile("sgd", "mse")
    return model


def fit(model, callback, epochs=3, **options):
    options = {"batch_size": 8, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=[callback], **options).history


def curves(run):
    """Return {tag: {step: value}} of the scalars in the files of a run."""
    read = {}
    for file in sorted(run.directory.glob("*tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                number = value.simple_value if value.HasField("simple_value") else None
                read.setdefault(value.tag, {})[event.step] = number
    return read


def test_each_epoch_is_a_step(tmp_path, model):
    with Run(tmp_path) as run:
        history = fit(model, run.keras_callback(), validation_data=(X, Y))

    read = curves(run)
    assert list(read["epoch/loss"]) == [0, 1, 2]
    np.testing.assert_allclose(
        list(read["epoch/loss"].values()), history["loss"], rtol=1e-6
    )
    assert {"epoch/val_loss", "epoch/learning_rate"} <= set(read)
    assert not any(tag.startswith(("batch/", "weights/")) for tag in read)


def test_with_batches_each_batch_is_a_step(tmp_path, model):
    with Run(tmp_path) as run:
        fit(model, run.keras_callback(batches=2))

    read = curves(run)
    assert list(read["batch/loss"]) == [0, 2, 4, 6, 8, 10]
    assert list(read["epoch/loss"]) == [3, 7, 11]


def test_with_several_batches_in_one_execution_a_step_is_still_a_batch(tmp_path, model):
    model.compile("sgd", "mse", steps_per_execution=3)
    with Run(tmp_path) as run:
        fit(model, run.keras_callback(batches=1), epochs=2)

    read = curves(run)
    assert list(read["batch/loss"]) == [2, 3, 6, 7]  # the last of 3, of 1, of 3 ...
    assert list(read["epoch/loss"]) == [3, 7]


def test_a_second_fit_goes_on_where_the_first_ended(tmp_path, model):
    with Run(tmp_path) as run:
        callback = run.keras_callback()
        fit(model, callback, epochs=2)
        fit(model, callback, epochs=2)

        fit(model, run.keras_callback(), epochs=2)

    assert list(curves(run)["epoch/loss"]) == [0, 1, 2, 3, 4, 5]


def test_a_resumed_run_goes_on_at_its_epoch(tmp_path, model):
    with Run(tmp_path) as run:
        fit(model, run.keras_callback(), epochs=4)
    with Run(tmp_path, resume_from=2) as run:
        fit(model, run.keras_callback(), epochs=4, initial_epoch=2)

    files = sorted(tmp_path.glob("*tfevents*"))
    events = tf.compat.v1.train.summary_iterator(str(files[1]))
    steps = {e.step for e in events for v in e.summary.value if v.tag == "epoch/loss"}
    assert steps == {2, 3}


def test_weights_are_written_every_so_many_epochs(tmp_path, model):
    with Run(tmp_path) as run:
        fit(model, run.keras_callback(histograms=2), epochs=4)

    assert list(curves(run)["weights/net/dense/kernel"]) == [0, 2]


def test_the_graph_of_operations_and_of_layers_is_written(tmp_path, model):
    with Run(tmp_path) as run:
        fit(model, run.keras_callback())

    files = tmp_path.glob("*tfevents*")
    events = list(tf.compat.v1.train.summary_iterator(str(next(files))))
    assert sum(bool(event.graph_def) for event in events) == 1
    assert "layers/net" in curves(run)


def test_a_training_survives_the_loss_of_its_log(tmp_path, model, monkeypatch):
    run = Run(tmp_path)
    callback = run.keras_callback()

    def fail(*args):
        raise RunError("No.", got="a full disk", hint="room")

    monkeypatch.setattr(run, "log", fail)
    with pytest.warns(RuntimeWarning, match="The training goes on without its log"):
        history = fit(model, callback)
    assert len(history["loss"]) == 3


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "epoch"])
def test_what_is_no_number_of_batches_is_refused(tmp_path, every):
    with Run(tmp_path) as run, pytest.raises(InvalidArgumentError, match="batches=1"):
        run.keras_callback(batches=every)
