"""Kept until its importers know the new place."""

from tfgrad.runs.run import Run as Run
