import json
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.run import Run


def events(run):
    """Return the events of all files of a run after their heads, in order."""
    files = sorted(run.directory.glob("*tfevents*"))
    read = [list(tf.compat.v1.train.summary_iterator(str(file))) for file in files]
    return [event for file in read for event in file[2:]]


def curve(run, tag):
    """Return the (steps, values) of a tag as they stand in the files."""
    values = [(e.step, v) for e in events(run) for v in e.summary.value]
    points = [(step, v.simple_value) for step, v in values if v.tag == tag]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return list(steps), np.array(values)


def record(run):
    return json.loads((run.directory / "run.json").read_text())


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "run") as run:
        yield run


# --- scalars --------------------------------------------------------------------------


def test_logged_numbers_are_read_back(run):
    run.log(0, loss=1.0, error=2)
    run.log(5, {"loss": np.float32(0.5), "gradient/norm": tf.constant(3.0)})

    assert curve(run, "loss")[0] == [0, 5]
    np.testing.assert_array_equal(curve(run, "loss")[1], [1.0, 0.5])
    assert curve(run, "gradient/norm")[0] == [5]


def test_a_tag_may_be_called_step(run):
    run.log(3, step=1.0, scalars=2.0)

    assert curve(run, "step")[0] == curve(run, "scalars")[0] == [3]


def test_a_history_is_read_back_to_the_last_float32_bit(run):
    values = np.random.default_rng(0).standard_normal((2, 25_000))
    run.log_history({"a": values[0], "b": values[1]}, np.arange(25_000))

    assert curve(run, "a")[0] == list(range(25_000))
    np.testing.assert_array_equal(curve(run, "a")[1], values[0].astype(np.float32))
    np.testing.assert_array_equal(curve(run, "b")[1], values[1].astype(np.float32))


def test_one_event_carries_all_tags_of_a_step(run):
    run.log_history({"a": [1.0, 2.0], "b": [3.0, 4.0]}, range(2))

    assert [len(event.summary.value) for event in events(run)] == [2, 2]


def test_numbers_that_are_not_finite_are_kept(run):
    values = [np.nan, np.inf, -np.inf]
    run.log_history({"a": values}, range(3))

    np.testing.assert_array_equal(curve(run, "a")[1], values)


def test_a_history_is_spread_over_the_time_since_the_last_call(run):
    before = time.time()
    run.log(0, a=0.0)
    run.log_history({"a": np.ones(4)}, range(1, 5))
    after = time.time()

    times = np.array([event.wall_time for event in events(run)])
    gaps = np.diff(times)
    assert before <= times[0] <= times[-1] <= after
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-5)


def test_given_times_are_kept(run):
    run.log_history({"a": np.ones(2)}, range(2), wall_times=[5.0, 7.5])

    assert [event.wall_time for event in events(run)] == [5.0, 7.5]


def test_a_history_of_nothing_writes_nothing(run):
    run.log_history({"a": []}, [])
    run.log_history({}, range(3))

    assert events(run) == []


def test_tags_may_have_steps_of_their_own(run):
    run.log(10, training=1.0)
    run.log(5, validation=1.0)

    assert curve(run, "validation")[0] == [5]


@pytest.mark.parametrize("step", [4, 5])
def test_a_step_that_does_not_grow_is_refused(run, step):
    run.log(5, loss=1.0)

    with pytest.raises(
        InvalidArgumentError, match=rf"(?s)'loss' at step {step}, after"
    ):
        run.log(step, loss=1.0)
    with pytest.raises(InvalidArgumentError, match=rf"Run\(..., resume_from={step}\)"):
        run.log_history({"loss": [1.0]}, [step])


BAD_INPUT = {
    "string": lambda run: run.log(0, good=1.0, bad="1.0"),
    "vector": lambda run: run.log(0, good=1.0, bad=[1.0, 2.0]),
    "empty tag": lambda run: run.log(0, {"good": 1.0, "": 2.0}),
    "no mapping": lambda run: run.log(0, ["good"]),
    "negative step": lambda run: run.log(-1, good=1.0),
    "lengths": lambda run: run.log_history({"good": [1.0], "bad": [1.0, 2.0]}, [0]),
    "falling steps": lambda run: run.log_history({"good": [1.0, 2.0]}, [1, 0]),
    "times": lambda run: run.log_history({"good": [1.0]}, [0], wall_times=[1.0, 2.0]),
    "no history": lambda run: run.log_history([1.0], [0]),
    "no text": lambda run: run.text("good", 3),
    "empty text tag": lambda run: run.text("", "text"),
    "text step": lambda run: run.text("good", "text", step=1.5),
    "histogram": lambda run: run.histogram("good", "weights", step=0),
    "histogram step": lambda run: run.histogram("good", [1.0], step=-1),
    "image": lambda run: run.image("good", [1.0]),
    "layout": lambda run: run.layout({"good": "bad"}),
}


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(run, bad):
    with pytest.raises(InvalidArgumentError, match="try: "):
        bad(run)

    assert events(run) == []
    run.log(0, good=1.0)  # nor is anything remembered


def test_a_tag_of_two_kinds_is_refused(run):
    run.log(0, loss=1.0)
    run.text("card", "text")

    with pytest.raises(InvalidArgumentError, match="a text here and a scalar before"):
        run.text("loss", "text")
    with pytest.raises(InvalidArgumentError, match='such as "scalar/card"'):
        run.log(0, card=1.0)


def test_threads_may_log_at_the_same_time(run):
    def write(tag):
        for step in range(200):
            run.log(step, {tag: step})

    threads = [threading.Thread(target=write, args=[f"t{i}"]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for i in range(4):
        assert curve(run, f"t{i}")[0] == list(range(200))


# --- text and graphs ------------------------------------------------------------------


def test_a_card_is_written_for_the_text_plugin(run):
    run.text("problem", "# Parabola", step=3)

    (event,) = events(run)
    assert event.step == 3
    assert event.summary.value[0].metadata.plugin_data.plugin_name == "text"
    assert event.summary.value[0].tensor.string_val == [b"# Parabola"]


def test_the_first_graph_is_the_runs_and_others_have_names(run):
    run.graph(lambda x: x**2, 3.0)
    run.graph(lambda x: x**3, 3.0, name="cube")

    first, second = events(run)
    value = second.summary.value[0]
    assert tf.compat.v1.GraphDef.FromString(first.graph_def).node
    assert value.tag == "graph/cube"
    assert value.metadata.plugin_data.plugin_name == "graph_run_metadata_graph"
    assert value.metadata.plugin_data.content == b"1"


def test_a_graph_does_not_take_the_tag_of_a_scalar(run):
    def loss(x):
        return x**2

    run.log(0, loss=1.0)
    run.graph(loss, 3.0)
    run.log(1, loss=0.5)

    assert record(run)["tags"] == {"loss": "scalar", "graph/loss": "graph"}


def test_a_second_graph_of_one_name_is_refused(run):
    run.graph(tf.square, 3.0)

    with pytest.raises(InvalidArgumentError, match=r"(?s)'square', which.*try: name="):
        run.graph(tf.square, 3.0)


# --- histograms, images, layouts ------------------------------------------------------


def plugins(run):
    values = [(e.step, v) for e in events(run) for v in e.summary.value]
    return [(v.tag, step, v.metadata.plugin_data.plugin_name) for step, v in values]


def test_a_histogram_and_an_image_are_written_for_their_plugins(run):
    run.histogram("weights", [1.0, 2.0, np.nan], step=3)
    run.image("picture", np.zeros((4, 5)), step=7)

    assert plugins(run) == [("weights", 3, "histograms"), ("picture", 7, "images")]
    weights, picture = (event.summary.value[0].tensor for event in events(run))
    assert tf.make_ndarray(weights)[:, 2].sum() == 2
    assert picture.string_val[:2] == [b"5", b"4"]


def test_a_run_has_one_layout(run):
    run.layout({"fit": {"loss": ["a", "b"]}})

    assert plugins(run) == [("custom_scalars__config__", 0, "custom_scalars")]
    with pytest.raises(InvalidArgumentError, match=r"one layout(?s:.*)in one call"):
        run.layout({"fit": {"loss": ["a", "b"]}})


@pytest.mark.parametrize(
    ("status", "shown"), [("success", 1), ("steps", 1), ("nonfinite", 2)]
)
def test_hparams_show_how_a_run_ended(tmp_path, status, shown):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = Run(tmp_path, {"rate": 0.1})
    run.close(status)
    content = events(run)[-1].summary.value[0].metadata.plugin_data.content
    assert HParamsPluginData.FromString(content).session_end_info.status == shown


def test_a_file_that_was_deleted_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr("tfgrad.runs.events._CHECK_SECONDS", 0.0)
    run = Run(tmp_path)
    for file in tmp_path.glob("*tfevents*"):
        file.unlink()

    with pytest.raises(RunError, match=r"deleted while its run was alive"):
        run.log(0, loss=1.0)
    run.close()


# --- hyper-parameters -----------------------------------------------------------------


def test_hyper_parameters_are_written_for_their_plugin(tmp_path):
    with Run(tmp_path, {"rate": 0.1, "method": "sgd", "steps": None}) as run:
        pass

    start, end = (event.summary.value[0] for event in events(run))
    assert start.tag == "_hparams_/session_start_info"
    assert end.tag == "_hparams_/session_end_info"
    assert record(run)["hparams"] == {"rate": 0.1, "method": "sgd", "steps": "None"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.float32(0.5), 0.5),
        (tf.constant(0.5), 0.5),
        (tf.Variable(3), 3),
        (np.array(True), True),
        (2**53, 2**53),
        (2**53 + 1, "9007199254740993"),  # the tab would show ...992
        (10**400, str(10**400)),
        ((1, 2), "(1, 2)"),
    ],
)
def test_a_hyper_parameter_is_a_number_where_the_tab_can_show_it(
    tmp_path, value, shown
):
    with Run(tmp_path, {"it": value}) as run:
        pass

    assert record(run)["hparams"] == {"it": shown}
    assert type(record(run)["hparams"]["it"]) is type(shown)


@pytest.mark.parametrize("hparams", [[("rate", 0.1)], {3: 0.1}, {"": 0.1}])
def test_hyper_parameters_must_have_names(tmp_path, hparams):
    with pytest.raises(InvalidArgumentError):
        Run(tmp_path / "run", hparams)

    assert not (tmp_path / "run").exists()


# --- the life of a run ----------------------------------------------------------------


def test_a_run_is_running_until_it_is_closed(tmp_path):
    run = Run(tmp_path)
    run.describe(seed=3)
    assert (record(run)["status"], record(run)["facts"]) == ("running", {"seed": 3})

    run.close("gtol", x=np.array([0.1]), fun=float("nan"))
    assert record(run)["status"] == "gtol"
    assert record(run)["result"] == {"x": [0.1], "fun": "NaN"}


def test_a_block_that_ends_well_is_a_success(tmp_path):
    with Run(tmp_path) as run:
        pass

    assert record(run)["status"] == "success"
    assert record(run)["seconds"] >= 0


def fail(run, error):
    with run:
        raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), "failure"), (KeyboardInterrupt("no"), "interrupted")],
)
def test_a_block_that_ends_in_an_error_is_marked_with_it(tmp_path, error, status):
    run = Run(tmp_path)
    with pytest.raises(type(error), match="no"):
        fail(run, error)

    assert record(run)["status"] == status
    assert record(run)["result"] == {"error": f"{type(error).__name__}: no"}


def test_the_first_close_counts(tmp_path):
    with Run(tmp_path) as run:
        run.close("nonfinite")
    run.close()

    assert record(run)["status"] == "nonfinite"


TOO_LATE = {
    "log": lambda run: run.log(0, loss=1.0),
    "log_history": lambda run: run.log_history({"loss": [1.0]}, [0]),
    "text": lambda run: run.text("card", "text"),
    "graph": lambda run: run.graph(tf.square, 3.0),
    "histogram": lambda run: run.histogram("h", [1.0], 0),
    "image": lambda run: run.image("i", np.zeros((2, 2))),
    "layout": lambda run: run.layout({"a": {"b": ["c"]}}),
    "describe": lambda run: run.describe(seed=1),
}


@pytest.mark.parametrize("late", TOO_LATE.values(), ids=TOO_LATE)
def test_a_closed_run_takes_no_more(tmp_path, late):
    run = Run(tmp_path)
    run.close()

    with pytest.raises(RunError, match=r"(?s)got: .*, closed.*try: log inside"):
        late(run)


def test_a_second_run_gets_a_directory_of_its_own(tmp_path):
    with Run(tmp_path / "sgd") as first, Run(tmp_path / "sgd") as second:
        first.log(0, loss=1.0)
        second.log(0, loss=2.0)

    assert second.directory == tmp_path / "sgd-002"
    np.testing.assert_array_equal(curve(first, "loss")[1], [1.0])


def test_a_run_that_cannot_begin_lets_its_directory_go(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="mend the file"):
        Run(tmp_path, resume_from=1)

    (tmp_path / "run.json").unlink()
    Run(tmp_path, resume_from=1).close()


# --- going on -------------------------------------------------------------------------


def test_a_resumed_run_opens_a_new_file_that_supersedes_later_steps(tmp_path):
    with Run(tmp_path) as run:
        run.log_history({"loss": np.arange(10.0)}, range(10))
    with Run(tmp_path, resume_from=5) as resumed:
        resumed.log(5, loss=-5.0)

    first, second = sorted(tmp_path.glob("*tfevents*"))
    head = list(tf.compat.v1.train.summary_iterator(str(second)))[1]
    assert resumed.directory == tmp_path
    assert first.stat().st_size > second.stat().st_size
    assert (head.session_log.status, head.step) == (tf.compat.v1.SessionLog.START, 5)
    assert record(run)["resumed_from"] == 5
    assert record(run)["earlier"][0]["resumed_from"] is None


def test_tags_that_are_not_logged_again_are_superseded_too(tmp_path):
    with Run(tmp_path) as run:
        run.log(0, loss=1.0, other=1.0)
        run.graph(tf.square, 3.0)
    Run(tmp_path, resume_from=5).close()

    marks = events(run)[-1]
    assert marks.step == 5
    assert [value.tag for value in marks.summary.value] == ["loss", "other"]
    assert not any(v.WhichOneof("value") == "simple_value" for v in marks.summary.value)


def test_a_run_from_the_start_again_writes_its_graph_again(tmp_path):
    for first in (None, 0):
        with Run(tmp_path, resume_from=first) as run:
            run.graph(tf.square, 3.0)

    assert sum(bool(event.graph_def) for event in events(run)) == 2


def test_the_tags_of_a_run_that_was_killed_are_known(tmp_path):
    run = Run(tmp_path)
    run.log(0, loss=1.0)
    run.text("card", "text")
    assert record(run)["tags"] == {"loss": "scalar", "card": "text"}
    del run

    with (
        Run(tmp_path, resume_from=1) as run,
        pytest.raises(InvalidArgumentError, match="a scalar before"),
    ):
        run.text("loss", "text")


def test_thousands_of_tags_do_not_each_write_the_record(run, monkeypatch):
    writes = []
    monkeypatch.setattr(run._record, "update", lambda **facts: writes.append(facts))
    for number in range(2000):
        run.log(0, {f"tag/{number}": 1.0})

    assert len(writes) < 400


def test_text_that_is_no_utf8_is_written_as_it_can_be(tmp_path):
    with Run(tmp_path / "a\udc80", {"file": "b\udc80"}) as run:
        run.describe(path="c\udc80")
        run.text("card", "d\udc80")

    assert record(run)["hparams"] == {"file": "b\\udc80"}
    assert record(run)["facts"] == {"path": "c\\udc80"}
    run.directory.rename(tmp_path / "a")  # TensorFlow reads no such name in text
    card = next(tmp_path.glob("a/*tfevents*")).read_bytes()
    assert b"d\\udc80" in card


def test_a_resumed_run_takes_no_step_before_the_one_it_resumes_from(tmp_path):
    Run(tmp_path).close()
    with Run(tmp_path, resume_from=5) as run:
        with pytest.raises(InvalidArgumentError, match="step 4, in a run resumed"):
            run.log(4, loss=1.0)
        run.text("problem", "the same card")

        assert events(run)[0].step == 5


def test_a_resumed_run_knows_the_tags_of_its_earlier_sessions(tmp_path):
    with Run(tmp_path) as run:
        run.log(0, loss=1.0)
        run.graph(tf.square, 3.0)
    with Run(tmp_path, resume_from=5) as run:
        with pytest.raises(InvalidArgumentError, match="a scalar before"):
            run.text("loss", "text")
        run.graph(tf.square, 3.0)  # left as it is
        run.graph(tf.exp, 3.0)  # a second one: the run's own stays the first

    graphs = [event for event in events(run) if event.graph_def]
    assert len(graphs) == 1
    named = [v.tag for e in events(run) for v in e.summary.value]
    assert named == ["loss", "loss", "graph/exp"]  # the second one supersedes


@pytest.mark.parametrize("step", [-1, 1.5, "5", True])
def test_a_run_is_resumed_from_a_step(tmp_path, step):
    with pytest.raises(InvalidArgumentError, match="resume_from="):
        Run(tmp_path, resume_from=step)


def test_a_live_run_is_not_resumed(tmp_path):
    with Run(tmp_path), pytest.raises(RunError, match="one writer at a time"):
        Run(tmp_path, resume_from=1)


def test_whether_a_run_is_open_can_be_asked_before_anything_is_done(tmp_path):
    with Run(tmp_path) as run:
        run.check_open()

    with pytest.raises(RunError, match="closed"):
        run.check_open()


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.version", None)

    with pytest.raises(RunError, match=r"try: pip install \"tensorboard>=2.21\""):
        Run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
