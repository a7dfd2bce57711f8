"""Greedy output against an independent implementation, through /v1/completions."""

from conftest import MODEL_NAME


def cases(golden):
    assert len(golden["generate"]) == 6
    return golden["generate"]


def request(case, prompt):
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": len(case["output_ids"]), "temperature": 0}


def test_whole(client, golden):
    for case in cases(golden):
        answer = client.completions.create(**request(case, case["prompt"]))
        assert answer.choices[0].text == case["text"], case["prompt"]
        assert answer.usage.prompt_tokens == len(case["prompt_ids"])
        assert answer.usage.completion_tokens == len(case["output_ids"])


def test_token_ids_as_prompt(client, golden):
    for case in cases(golden):
        answer = client.completions.create(**request(case, case["prompt_ids"]))
        assert answer.choices[0].text == case["text"], case["prompt"]


def test_streamed(client, golden):
    for case in cases(golden):
        stream = client.completions.create(**request(case, case["prompt"]), stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert text == case["text"], case["prompt"]


def test_together(client, golden):
    """All prompts in one request, batched by the server."""
    longest = max(len(case["output_ids"]) for case in cases(golden))
    answer = client.completions.create(
        model=MODEL_NAME, prompt=[case["prompt"] for case in cases(golden)], max_tokens=longest, temperature=0)
    for case, choice in zip(cases(golden), answer.choices):
        assert choice.text.startswith(case["text"]), case["prompt"]


def test_encodings(server, golden):
    import httpx2 as httpx

    for case in golden["encode"]:
        if "<s>" in case["text"]:
            continue  # read as plain text in the golden file; a prompt's special tokens are recognised
        answer = httpx.post(server.url + "/tokenize", json={"prompt": case["text"]})
        assert answer.json()["tokens"] == case["ids"], case["text"]
