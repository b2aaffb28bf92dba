"""What every test shares: a quiet TensorFlow, no GPU, a Ctrl-C that is heeded."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell starts what runs in its background without Ctrl-C, which all that the tests
# start would inherit: those that send it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import tensorflow as tf

_iterate = tf.data.Dataset.__iter__
_untuned = tf.data.Options()
_untuned.autotune.enabled = False

# Keras's `fit` lets TensorFlow tune its pipelines, in a thread that now and then misses
# that it is to end: what frees the pipeline then waits for it, for up to a minute.
tf.data.Dataset.__iter__ = lambda self: _iterate(self.with_options(_untuned))

# Traces are many small objects: looking through them as often as Python does by itself,
# and again and again through those of earlier modules, takes a tenth of the time.
gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def _what_is_left_is_kept():
    yield
    gc.collect()
    gc.freeze()
