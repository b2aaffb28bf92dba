"""Kept until its importers know the new place."""

from tfgrad.runs.plots import Picture as Picture
from tfgrad.runs.plots import draw_path as draw_path
