"""Kept until its importers know the new place."""

from tfgrad.runs.directory import event_files as event_files
from tfgrad.runs.reader import read_run as read_run
