"""Kept until its importers know the new place."""

from tfgrad.runs.values import UniqueNames as UniqueNames
