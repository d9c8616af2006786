"""Functions that end a test's program, or interrupt it, at a chosen call."""

import itertools
import os
import signal


def interrupt_at(function, number):
    calls = itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def die_at(module, name, number, when):
    """Replaces a function by one that ends the program before or after its call `number`."""
    function, calls = getattr(module, name), itertools.count(1)

    def deadly(*args, **kwargs):
        last = next(calls) == number
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)
