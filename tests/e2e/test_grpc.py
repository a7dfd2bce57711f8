"""gRPC and HTTP give the same tokens for the same request."""

import grpc
import pytest
from conftest import MODEL_NAME
from grpc_client import GrpcClient

SERVING = 1


@pytest.fixture(scope="module")
def rpc(server):
    return GrpcClient(server.grpc)


def test_health(rpc):
    assert rpc.health("") == SERVING
    assert rpc.health("vllm.Inference") == SERVING


def test_golden_tokens(rpc, golden):
    for case in golden["generate"]:
        fields = {"text": case["prompt"], "stopping": {"max_new_tokens": len(case["output_ids"])},
                  "response": {"output_token_ids": True, "prompt_token_ids": True}}
        whole = rpc.generate(**fields)
        assert list(whole.prompt_info.token_ids) == case["prompt_ids"]
        assert list(whole.outputs.token_ids) == case["output_ids"]
        assert whole.outputs.text == case["text"]
        pieces = list(rpc.generate(stream=True, **fields))
        assert [token for piece in pieces for token in piece.outputs.token_ids] == case["output_ids"]
        assert "".join(piece.outputs.text for piece in pieces) == case["text"]


def test_sampled_text_and_logprobs_equal_http(rpc, client):
    over_http = client.completions.create(
        model=MODEL_NAME, prompt="The sun", max_tokens=32, temperature=0.75, top_p=0.875, seed=5, logprobs=2,
        extra_body={"top_k": 50, "min_p": 0.015625}).choices[0]
    over_grpc = rpc.generate(
        text="The sun", temperature=0.75, sampling={"top_k": 50, "top_p": 0.875, "min_p": 0.015625, "seed": 5},
        stopping={"max_new_tokens": 32},
        response={"output_logprobs": True, "output_candidates": {"top_n": 2}}).outputs
    assert over_grpc.text == over_http.text
    assert list(over_grpc.logprobs) == pytest.approx(over_http.logprobs.token_logprobs, abs=1e-6)
    assert all(len(candidates.tokens) >= 2 for candidates in over_grpc.candidate_tokens)


def test_errors(rpc):
    for code, fields in {
        grpc.StatusCode.NOT_FOUND: {"text": "x", "model": "another"},
        grpc.StatusCode.OUT_OF_RANGE: {"token_ids": {"ids": [5] * 600}},
        grpc.StatusCode.UNIMPLEMENTED: {"text": "x", "decoding": {"regex": "a"}},
        grpc.StatusCode.INVALID_ARGUMENT: {"text": "x", "temperature": -1},
    }.items():
        with pytest.raises(grpc.RpcError) as error:
            rpc.generate(**fields)
        assert error.value.code() == code, error.value.details()
