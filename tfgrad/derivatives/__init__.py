"""Transforms: they take a function and return the function that differentiates it."""
