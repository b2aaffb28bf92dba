"""The TensorBoard process that `show` starts: `python serve.py --logdir ...`.

The process prints the address at which it serves, and ends with its standard input:
when the parent closes that, or dies. TensorBoard's data server then ends, too.
"""

import mimetypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    # With TensorFlow, TensorBoard takes 4 to 14 seconds to start; without, 0.7. Its own
    # stand-in for TensorFlow is enough for every tab that is used here.
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # blocks the import
    from tensorboard import program

    _let_no_file_hide_another()
    # As TensorBoard's own command does: the Windows registry may name other types.
    mimetypes.add_type("text/javascript", ".js")
    mimetypes.add_type("text/html", ".html")
    server = program.TensorBoard()
    server.configure(["tensorboard", *sys.argv[1:]])
    print(server.launch(), flush=True)
    sys.stdin.read()


def _let_no_file_hide_another() -> None:
    """Make TensorBoard's Python loader read on after a file that it cannot read.

    An exception about one file ends the thread that loads all of them, and a pipe,
    which never ends, stops that thread for ever.
    """
    from tensorboard.backend.event_processing import event_file_loader, io_wrapper

    def guarded(load: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def load_what_can_be_read(self: Any) -> Iterator[Any]:
            try:
                yield from load(self)
            except Exception as error:  # MemoryError, DecodeError, OverflowError ...
                print(f"an event file is left out: {error!r}", file=sys.stderr)

        return load_what_can_be_read

    for name in ("RawEventFileLoader", "LegacyEventFileLoader", "EventFileLoader"):
        loader = getattr(event_file_loader, name)
        loader.Load = guarded(loader.Load)
    is_event_file = io_wrapper.IsTensorFlowEventsFile
    io_wrapper.IsTensorFlowEventsFile = lambda path: (
        is_event_file(path) and os.path.isfile(path)  # noqa: PTH113 - it gives strings
    )


if __name__ == "__main__":
    main()
