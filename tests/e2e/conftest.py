"""Starts the built program on a small trained model, which is looked for beside the checkout."""

import json
import os
import pathlib
import signal
import subprocess
import threading

import httpx2 as httpx
import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
STORIES = SOURCE.parent / "shared" / "models" / "stories260K"
BINARY = os.environ.get("SPILLWAY_BINARY", str(SOURCE / "build" / "release" / "spillway"))
MODEL_NAME = "stories"


def stories_or_skip():
    if not (STORIES / "hf" / "config.json").exists():
        pytest.skip(f"test data is absent: {STORIES}")
    return STORIES


class Server:
    """A running `spillway serve` on free ports."""

    def __init__(self, *flags, built_in_model=False, kv_cache="64MiB", preexec=None):
        self.lines = []
        model = [] if built_in_model else [str(stories_or_skip() / "hf")]
        self.process = subprocess.Popen(
            [BINARY, "serve", *model, "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", "0", "--grpc-port",
             "0", "--log-format", "json", "--kv-cache-memory-bytes", kv_cache, *map(str, flags)],
            stderr=subprocess.PIPE, text=True, preexec_fn=preexec)
        ready = None
        for line in self.process.stderr:
            self.lines.append(line)
            event = json.loads(line)
            if event["message"] == "ready":
                ready = event
                break
        if ready is None:
            self.process.wait(timeout=60)
        assert ready is not None, "did not start: " + "".join(self.lines)
        self.ready = ready
        self.url = ready["http"]
        self.grpc = ready["grpc"]
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self):
        code = self.process.wait(timeout=60)
        self.reader.join()
        return code

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()

    def get(self, path):
        return httpx.get(self.url + path, timeout=30)

    def metric(self, name, **labels):
        """The sum of a metric's values over all series that have these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            if line.startswith("#") or not line.startswith(name):
                continue
            series, value = line.rsplit(" ", 1)
            if series.split("{")[0] == name and all(f'{key}="{want}"' in series for key, want in labels.items()):
                total += float(value)
        return total


@pytest.fixture(scope="session")
def stories():
    return stories_or_skip()


@pytest.fixture(scope="session")
def golden(stories):
    return json.loads((stories / "golden.json").read_text())


@pytest.fixture(scope="session")
def server():
    running = Server()
    yield running
    running.signal()
    assert running.wait() == 0


@pytest.fixture
def slow_server():
    """Computes with plain loops on one thread, so that a request of many choices takes seconds."""
    running = Server("--cpu-target", "reference", "--threads", "1")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server):
    import openai

    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)
