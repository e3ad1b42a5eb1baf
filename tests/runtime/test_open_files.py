"""A rank of a large run needs a socket for every other rank."""

import subprocess
import sys

CODE = """
import resource
from illada_megatron.config import load_config
from illada_megatron.runtime import runtime
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, most), most))
with runtime(load_config(None, ["runtime.device=cpu"])):
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
"""


def test_a_run_may_open_as_many_files_as_it_is_allowed() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
