"""Run a command, and print what it took as JSON: wall seconds, peak memory, how it ended.

    python -I -S tools/measured.py SECONDS COMMAND ... < its input > {"seconds", "peak_mb", ...}

A process of its own, and a small one: Linux counts what the parent held when it forked to the peak
of the child. The command's own output comes along as text; after SECONDS it is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any


def run(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a command on this process's input: `seconds`, `peak_mb`, `status`, `stdout`.

    `status` is the exit code, minus a signal's number, or None where it was killed at the limit.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        late = False
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if not late and time.perf_counter() > began + limit:
                late = True
                process.kill()
            time.sleep(0.005)
        wall = time.perf_counter() - began
        code = process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read().decode(errors="replace")
    peak = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    return {"seconds": wall, "peak_mb": peak, "status": None if late else code, "stdout": said}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[2:], float(sys.argv[1]))))
