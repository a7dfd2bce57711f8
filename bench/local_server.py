"""A server on this machine for the length of a benchmark, and the load that is put on it."""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build" / "release" / "spillway"
THREADS = len(os.sched_getaffinity(0))
READY_SECONDS = 60


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


class Server:
    def __init__(self, command):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(word) for word in [*command, "--host", "127.0.0.1", "--port", self.port]]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def await_ready(self):
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(0.1)
        raise SystemExit(f"the server has not answered within {READY_SECONDS} s")

    def post(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def load(self, clients, num_prompts, input_len, output_len):
        """The report of `spillway bench serve`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            run(PROGRAM, "bench", "serve", "--host", "127.0.0.1", "--port", self.port, "--max-concurrency", clients,
                "--num-prompts", num_prompts, "--random-input-len", input_len, "--random-output-len", output_len,
                "--ignore-eos", "--save-result", "--result-filename", path)
            return json.loads(path.read_text())

    def stop(self):
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def running(*options):
    """`spillway serve` with these options, ready."""
    server = Server([PROGRAM, "serve", *options, "--log-level", "error"])
    try:
        server.await_ready()
        yield server
    finally:
        server.stop()
