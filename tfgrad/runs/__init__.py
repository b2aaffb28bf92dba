"""Runs: write what a loop does, and watch it in TensorBoard.

`Run` (writer.py) writes one TensorBoard run; `show` (board.py) opens TensorBoard on
many. This floor takes numbers and functions; it knows nothing of optimisation.
"""
