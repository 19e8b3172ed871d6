"""When a run has had enough of steps whose gradient is not finite."""

EXIT_CODE = 3  # of a process whose run diverged


class DivergedError(Exception):
    """A run stopped itself: too many steps in a row had a gradient that is not finite."""


def check_row(step: int, in_a_row: int, limit: int) -> None:
    """Ends a run that skips one step after another.

    Args:
        step: the last one.
        in_a_row: steps up to it that were skipped.
        limit: how many of them end the run.

    Raises:
        DivergedError: the limit is reached.
    """
    if in_a_row >= limit:
        raise DivergedError(
            f"diverged: the gradients of steps {step - in_a_row + 1} to {step} are not finite. "
            "Lower the learning rates or lengthen the warmup; --nonfinite-limit is how many such "
            f"steps in a row end a run, now {limit}."
        )
