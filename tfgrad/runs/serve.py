"""The TensorBoard process that `show` starts: `python serve.py --logdir ...`.

It prints the address it serves at, and leaves when its standard input ends: when the
parent closes it, or dies in whatever way. The data server does the same in turn.
"""

import mimetypes
import sys


def main() -> None:
    """Serve until standard input ends."""
    # TensorBoard asks for TensorFlow and then takes 4 to 14 seconds instead of 0.7. It
    # falls back on a stub of its own, with which every tab that is used here works.
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # blocks the import
    from tensorboard import program

    # As TensorBoard's own command does: a Windows registry may say otherwise.
    mimetypes.add_type("text/javascript", ".js")
    mimetypes.add_type("text/html", ".html")
    server = program.TensorBoard()
    server.configure(["tensorboard", *sys.argv[1:]])
    print(server.launch(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
