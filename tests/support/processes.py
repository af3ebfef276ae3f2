"""Other processes: what a server or another backend does with our files."""

import os
import socket
import subprocess
import sys

# Runs first in the process and blocks imports of the packages in BLOCKED.
_BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocked())
for package in BLOCKED:
    try:
        __import__(package)
    except ImportError:
        continue
    raise SystemExit(f"{package} could be imported")
"""


def run(arguments, cwd, timeout=300, python=sys.executable, **environment):
    """Run Python with these arguments, free of this process's paths and workers."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "KERAS_BACKEND"))
    }
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**inherited, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_together(commands, timeout=500):
    """Run Python with these (arguments, environment) at once; return their last lines.

    If one fails or is late, all are ended.
    """
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for arguments, environment in commands
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    statuses = [process.returncode for process in started]
    assert not any(statuses), f"returned {statuses}"
    return [text.splitlines()[-1] for text in printed]


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def run_without(packages, code, cwd, *arguments, **environment):
    """Run code in a process that cannot import `packages`; it must exit with 0."""
    script = f"BLOCKED = {list(packages)!r}\n{_BLOCKER}\n{code}"
    done = run(["-c", script, *arguments], cwd, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def in_this_process(main, capture):
    """Return a function that runs a command: arguments to status, stdout and stderr."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capture.readouterr()
        return status, printed.out, printed.err

    return call
