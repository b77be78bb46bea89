"A vLLM server of the embedded model for a test; it ends with the processes that it started."

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qalign.engine import embedded_model


@contextmanager
def vllm_server(
    log: Path,  # what the server says
    *flags: str,
    python: Path | str = sys.executable,  # of the environment that has vLLM
    env: dict[str, str] | None = None,
    **options: object,  # of the server, with _ for -
) -> Iterator[str]:
    "Start it; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = {"model": embedded_model(), "host": "127.0.0.1", "port": port, "block_size": 32, **options}
    args = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *args, "--enforce-eager", *flags]
    settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **(env or {})}
    settings.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    "Until the server answers; its last words if it does not."
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
