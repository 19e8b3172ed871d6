"""A trace of a few steps, to see where the time goes."""

import pathlib

import jax

STEPS = 3
_AFTER = 2  # the first steps of a process are not like the others


class Profile:
    """Traces some steps of this process into a folder, in the format of TensorBoard and XProf.

    Args:
        folder: is made; None: nothing is traced.
        first: the first step of this process.
    """

    def __init__(self, folder: pathlib.Path | None, first: int):
        self._folder, self.steps = folder, range(first + _AFTER, first + _AFTER + STEPS)
        self._running = False

    def due(self, step: int) -> bool:
        """Tells whether tracing starts or ends before a step: none should be in flight then."""
        return self._folder is not None and step in (self.steps.start, self.steps.stop)

    def turn(self, step: int) -> None:
        """Starts or ends, where that is due."""
        if self._folder is not None and step == self.steps.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        """Ends the trace of a run that has no more steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
