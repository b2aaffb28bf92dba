"""Procedures that tell whether a derivative can be trusted."""
