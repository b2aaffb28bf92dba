"""Runs: write what a loop does, and watch it in TensorBoard.

`Run` (run.py) writes one TensorBoard run; `show` (board.py) opens TensorBoard on many;
`load_run` (reader.py) reads them back, `plot_runs` (plots.py) draws them. This room
takes numbers and functions; it knows nothing of optimisation.
"""
