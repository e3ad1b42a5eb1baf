"""`illada`, and `python -m illada_megatron`: a command as a process of its own."""

import atexit
import ctypes
import os
import signal
import sys

from illada_megatron.system.process import search_garbage_rarely


def program() -> None:
    """The command that sys.argv names; the process ends with its exit code, and without taking the interpreter apart.

    Gloo's threads live as long as the model does, which its own hooks keep alive, and may hold the last reference to a
    tensor of a collective that has ended. Where the interpreter is being taken apart at that moment the process aborts
    (pytorch/pytorch#179291): a rank that has done all its work, or has said what the user has to mend, would be one
    that crashed, and be started again.
    """
    code = 1  # of an exception, whose traceback the interpreter shows

    def end() -> None:
        unsaid = False
        try:
            for stream in (sys.stdout, sys.stderr):
                try:
                    if stream is not None and not stream.closed:
                        stream.flush()
                except (OSError, ValueError):
                    unsaid = True
            ctypes.CDLL(None).fflush(None)  # what C libraries have printed
        finally:
            os._exit(code or int(unsaid))

    search_garbage_rarely()
    atexit.register(end)  # before all else of this program: what is registered first runs last
    from illada_megatron.cli.main import main

    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # as for one that typer has met
        raise


if __name__ == "__main__":
    program()
