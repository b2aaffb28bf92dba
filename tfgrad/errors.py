"""Every exception that tfgrad raises on purpose, in one tree.

```
TfgradError
├── InvalidArgumentError   (ValueError)       an argument breaks a rule of the call
├── ScalarObjectiveError   (ValueError)       one number was needed, not this
├── NoGradientError        (ValueError)       a path to the output exists, but is cut
├── WrongDerivativeError   (ArithmeticError)  a derivative failed its verification
├── ConvergenceError       (ArithmeticError)  an inner problem was not solved
├── GradientMismatchError  (AssertionError)   autodiff and differences disagree
└── RunError               (OSError)          a run cannot be written, read or shown
```

A message has three lines: the rule in the caller's words, what arrived, what to type
next.
"""


class TfgradError(Exception):
    """The root of all of tfgrad's exceptions.

    Args:
        rule: What was needed, in the caller's words.
        got: What arrived: name, shape, dtype, value.
        hint: The next thing to type.
    """

    # Within a tf.function, AutoGraph replaces exceptions that it does not know by a
    # StagingError, unless they have this attribute.
    ag_pass_through = True

    def __init__(self, rule: str, *, got: str, hint: str) -> None:
        """Compose the message out of its three parts."""
        super().__init__(f"{rule}\n  got: {got}\n  try: {hint}")
        self.rule = rule
        self.got = got
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by parts, so that the error survives a process pool."""
        return _rebuild, (type(self), self.rule, self.got, self.hint)


def _rebuild(kind: type[TfgradError], rule: str, got: str, hint: str) -> TfgradError:
    return kind(rule, got=got, hint=hint)


class InvalidArgumentError(TfgradError, ValueError):
    """An argument breaks a rule of the call; nothing was traced or written."""


class ScalarObjectiveError(TfgradError, ValueError):
    """A function that must return one float number returned something else."""


class NoGradientError(TfgradError, ValueError):
    """The path from an input to the output exists, and its gradient is cut."""


class WrongDerivativeError(TfgradError, ArithmeticError):
    """A derivative failed its own verification and was withheld."""


class ConvergenceError(TfgradError, ArithmeticError):
    """An inner problem was not solved, or its solution has no derivative."""


class GradientMismatchError(TfgradError, AssertionError):
    """Autodiff and finite differences disagree by more than their error bars."""


class RunError(TfgradError, OSError):
    """A run directory cannot be created, written, read or shown."""
