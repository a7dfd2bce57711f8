"""Draining, a second signal, clients that go away."""

import signal

import httpx2 as httpx
from conftest import MODEL_NAME
from grpc_client import GrpcClient

NOT_SERVING = 2
CHOICES = 8


def long_request(server):
    """A stream of many choices, which takes the slow server seconds."""
    return httpx.stream("POST", server.url + "/v1/completions", timeout=120,
                        json={"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 400, "n": CHOICES, "seed": 1,
                              "temperature": 1, "ignore_eos": True, "stream": True})


def test_sigterm_drains(slow_server):
    rpc = GrpcClient(slow_server.grpc)
    assert slow_server.get("/ready").status_code == 200
    with long_request(slow_server) as stream:
        lines = stream.iter_lines()
        next(lines)
        slow_server.signal(signal.SIGTERM)
        while slow_server.get("/ready").status_code == 200:  # the signal is on its way
            pass
        assert slow_server.get("/ready").status_code == 503
        assert slow_server.get("/health").status_code == 200
        assert rpc.health("vllm.Inference") == NOT_SERVING
        refused = httpx.post(slow_server.url + "/v1/completions", json={"model": MODEL_NAME, "prompt": "x"})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" or rest[-2] == "data: [DONE]"
    assert slow_server.wait() == 0
    assert any('"draining' in line for line in slow_server.lines)


def test_second_signal_exits_at_once(slow_server):
    with long_request(slow_server) as stream:
        lines = stream.iter_lines()  # dropping it would close the stream
        next(lines)
        slow_server.signal(signal.SIGTERM)
        while slow_server.get("/ready").status_code == 200:
            pass
        slow_server.signal(signal.SIGTERM)
        assert slow_server.wait() == 130


def test_client_that_goes_away_frees_its_sequences(slow_server):
    with long_request(slow_server) as stream:
        next(stream.iter_lines())
    while slow_server.metric("vllm:num_requests_running") > 0:
        pass
    assert slow_server.metric("vllm:num_requests_waiting") == 0
    assert slow_server.metric("vllm:generation_tokens_total") < CHOICES * 400
    assert slow_server.metric("vllm:request_success_total", finished_reason="abort") == CHOICES
    assert slow_server.metric("vllm:kv_cache_usage_perc") == 0
