"""Steps that were skipped because their gradient was not finite, and when a run has had enough."""

EXIT_CODE = 3  # of a process whose run diverged


class DivergedError(Exception):
    """A run stopped itself: too many steps in a row had a gradient that is not finite."""


class NonFiniteSteps:
    """Counts skipped steps, all of them and those in a row.

    Args:
        limit: how many in a row end the run.

    >>> steps = NonFiniteSteps(limit=2)
    >>> [steps.add(step, bad) for step, bad in enumerate([True, False, True])]
    [1, 1, 2]
    """

    def __init__(self, limit: int):
        self._limit, self._row, self.total = limit, 0, 0

    def add(self, step: int, skipped: bool) -> int:
        """Takes a step's outcome; returns how many were skipped so far.

        Raises:
            DivergedError: the limit is reached.
        """
        self._row = self._row + 1 if skipped else 0
        self.total += skipped
        if self._row >= self._limit:
            raise DivergedError(
                f"diverged: the gradients of steps {step - self._row + 1} to {step} are not "
                "finite. Lower the learning rates or lengthen the warmup; --nonfinite-limit is "
                f"how many such steps in a row end a run, now {self._limit}."
            )
        return self.total
