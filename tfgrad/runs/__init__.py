"""Runs: write what a loop does, and watch it in TensorBoard.

`Run` (run.py) writes one TensorBoard run; `show` (board.py) opens TensorBoard on many;
`load_run` (reader.py) reads runs back, `plot_runs` (plots.py) draws them. The package
takes numbers and functions, and does not import `tfgrad.optimize`.
"""
