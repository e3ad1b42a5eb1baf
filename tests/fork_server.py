"""A process that has imported a program once, and becomes it as often as asked.

Importing torch and megatron-core takes most of a short run's time. This process has done it, has no other thread, and
forks for each command: the child is a process like any other that runs `illada ARGUMENTS`, with its own files for what
it says, and ends with the exit code of the command.

`python fork_server.py MODULE...` reads a line of JSON for each request and answers with one:
{"start": [arguments], "environment": {...}, "streams": [file, file]} -> pid; {"poll": pid} -> exit code (below 0: the
signal), or null while it runs; {"signal": [pid, number]} -> null.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1  # prctl(2)


class ForkServer:
    """Starts `illada` commands from a warm process, each with faults of its own (`Injection.environment`), if any.
    modules: to be imported beforehand. environment: of the process."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the server)
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.kill()  # its children die with it
        self._server.wait()

    def start(
        self,
        arguments: Sequence[str | Path],
        output: Path,
        environment: Mapping[str, str] | None = None,
        errors: Path | None = None,
    ) -> int:
        """Begin `illada ARGUMENTS`; its streams go into `output` and `errors` (None: there too). Returns its process
        id."""
        request = {"start": [str(one) for one in arguments], "environment": dict(environment or {})}
        return int(self._ask({**request, "streams": [str(output), str(errors or output)]}))

    def poll(self, pid: int) -> int | None:
        """Its exit code, as subprocess has it; None while it runs. To be asked once after it has ended."""
        code = self._ask({"poll": pid})
        return None if code is None else int(code)

    def wait(self, pids: Sequence[int], seconds: float) -> list[int | None]:
        """Their exit codes; None: it was still running after so long, and was killed."""
        codes: dict[int, int | None] = {}
        end = time.monotonic() + seconds
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes and (code := self.poll(pid)) is not None:
                    codes[pid] = code
            if time.monotonic() > end:
                for pid in [pid for pid in pids if pid not in codes]:
                    self.send(pid, signal.SIGKILL)
                    codes[pid] = None
            time.sleep(0.005)
        return [codes[pid] for pid in pids]

    def send(self, pid: int, number: signal.Signals) -> None:
        """A signal to a command that runs."""
        self._ask({"signal": [pid, int(number)]})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"the fork server has ended with {self._server.wait()}:\n{self._errors.read()}")
        return json.loads(answer)


def serve(modules: Sequence[str]) -> list[str]:
    """Answer requests until the end of input; in a child, return its arguments."""
    for module in modules:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads != 1:
        raise RuntimeError(f"{threads} threads after the imports: a fork would have one of them")
    answers = os.fdopen(os.dup(1), "w")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        answer: Any = None
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                _become(request["environment"], request["streams"])
                return request["start"]
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            os.kill(*request["signal"])
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit(0)


def _become(environment: Mapping[str, str], streams: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(environment)
    if "ILLADA_FAULTS" in environment:
        ctypes.CDLL(os.environ["LD_PRELOAD"]).AttachFaults(os.fsencode(environment["ILLADA_FAULTS"]))
    for stream, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, stream)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    from illada_megatron.__main__ import program

    if "LD_PRELOAD" in os.environ:  # for faults at certain calls
        from illada_megatron.checkpoint import owner

        owner.SIGN_SECONDS = 1e6  # its signs of life are calls at no certain place
    sys.argv = ["illada", *serve(sys.argv[1:])]
    program()
