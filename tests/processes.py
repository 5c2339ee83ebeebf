"""Python in another process, for what must be set before the library loads or may end the process."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(code, *, timeout=120, **environment):
    """Run code; a variable given as None is removed from the environment."""
    variables = {**os.environ, **{name: value for name, value in environment.items() if value is not None}}
    for name, value in environment.items():
        if value is None:
            variables.pop(name, None)
    # The tests' own modules can be imported there as here.
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [variables.get("PYTHONPATH")])]
    )
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_forked(child, timeout=30):
    """Call child() in a forked process; return its exit status, or None if it did not end in time."""
    import signal
    import time
    import warnings

    with warnings.catch_warnings():
        # From Python 3.12 on: "this process is multi-threaded". That is the point of the test.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if child() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
