"""Functions that end a test's program, or interrupt it, at a chosen call."""

import itertools
import multiprocessing
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


def exit_code_of(function, args, preloaded):
    """Of a process that runs `function`; a server imports the modules once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    process = context.Process(target=function, args=args)
    process.start()
    process.join(300)
    return process.exitcode
