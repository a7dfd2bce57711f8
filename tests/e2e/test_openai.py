"""The official openai client, unchanged."""

import openai
import pytest
from conftest import MODEL_NAME

PROMPT = "Once upon a time"


def complete(client, **parameters):
    return client.completions.create(**{"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **parameters})


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL_NAME]


def test_completion(client, golden):
    answer = complete(client, max_tokens=40)
    choice = answer.choices[0]
    assert golden["generate"][0]["text"].startswith(choice.text) and choice.text
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == 45


def test_stream_with_usage_equals_whole(client):
    whole = complete(client)
    text, finish, usage = "", None, None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert text == whole.choices[0].text
    assert finish == whole.choices[0].finish_reason
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_logprobs(client, golden):
    logprobs = complete(client, max_tokens=5, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert "".join(logprobs.tokens) == complete(client, max_tokens=5).choices[0].text
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
        assert chosen <= 0 and len(top) >= 3
        assert chosen == pytest.approx(max(top.values()))  # greedy


def test_three_choices_and_seed(client):
    first = complete(client, n=3, temperature=1, seed=7)
    again = complete(client, n=3, temperature=1, seed=7)
    other = complete(client, n=3, temperature=1, seed=8)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert texts != [choice.text for choice in other.choices]


def test_stop(client):
    whole = complete(client).choices[0].text
    word = whole.split()[3]
    stopped = complete(client, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(word)]
    kept = complete(client, stop=[word], extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == whole[: whole.index(word) + len(word)]


def test_chat(client):
    messages = [{"role": "user", "content": "Tell me a story."}]
    whole = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=16, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens <= 16
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=16, temperature=0, stream=True,
        stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
    text, usage, logprobs = "", None, 0
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            logprobs += len(choice.logprobs.content) if choice.logprobs else 0
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens == logprobs


def test_errors(client):
    with pytest.raises(openai.NotFoundError):
        complete(client, model="another")
    for parameter, value in {"temperature": -1, "top_p": 2, "n": 0, "max_tokens": -5, "logprobs": 1000}.items():
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, **{parameter: value})
        assert error.value.body["param"] == parameter
        assert error.value.body["code"] == 400
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, prompt=[5] * 600)
    assert "512" in error.value.body["message"] and "600" in error.value.body["message"]
    assert complete(client).choices[0].text, "the server is still there"
