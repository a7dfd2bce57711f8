"""The commands beside `serve`, as a user types them."""

import json
import subprocess

from conftest import BINARY, MODEL_NAME


def run(*arguments, **options):
    return subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def test_version_and_usage():
    assert run("--version").stdout.startswith("spillway ")
    assert run("serve", "--help").returncode == 0
    wrong = run("serve", "m", "--max-num-seq", "3")
    assert wrong.returncode == 2 and "max-num-seqs" in wrong.stderr
    refused = run("serve", "m", "--tensor-parallel-size", "2")
    assert refused.returncode == 2 and "tensor" in refused.stderr


def test_absent_models(tmp_path):
    absent = run("serve", "org/absent", env={"HF_HOME": str(tmp_path)})
    assert absent.returncode == 1 and "hf download org/absent" in absent.stderr
    cuda = run("serve", "m", "--device", "cuda", env={"HF_HOME": str(tmp_path)})
    assert cuda.returncode == 1


def test_run(stories, golden):
    case = golden["generate"][0]
    answer = run("run", stories / "hf", "-p", case["prompt"], "--temperature", 0, "--max-tokens", len(case["output_ids"]))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == case["text"] + "\n"
    piped = run("run", stories / "hf", "--temperature", 0, "-n", 5, input=case["prompt"])
    assert piped.returncode == 0 and case["text"].startswith(piped.stdout[:-1])


def test_built_in_model(tmp_path):
    """Without MODEL, from any folder."""
    said = "<|user|>Who are you?<|end|><|assistant|>"
    answer = run("run", "-p", said, "--temperature", 0, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "I am the small demo model of Spillway." in answer.stdout
    checked = run("check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_check(stories, tmp_path):
    for folder in ("hf", "hf-bf16", "hf-hd64", "hf-hd128"):
        answer = run("check", stories / folder)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "FAILED" not in answer.stdout and answer.stdout.count("ok ") == 8
    (tmp_path / "config.json").write_text("{}")
    broken = run("check", tmp_path)
    assert broken.returncode == 1 and "FAILED" in broken.stdout


def test_bench_throughput(stories):
    answer = run("bench", "throughput", stories / "hf", "--num-prompts", 8, "--random-input-len", 20, "--random-output-len", 10)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["num_requests"] == 8
    assert report["total_num_tokens"] == 8 * 30
    assert report["tokens_per_second"] > 0


def test_bench_serve(server, tmp_path):
    host, port = server.url.removeprefix("http://").split(":")
    path = tmp_path / "result.json"
    answer = run("bench", "serve", "--host", host, "--port", port, "--num-prompts", 12, "--random-input-len", 20,
                 "--random-output-len", 10, "--max-concurrency", 4, "--ignore-eos", "--save-result", "--result-filename", path)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(path.read_text())
    assert report["model_id"] == MODEL_NAME
    assert report["completed"] == 12 and report["failed"] == 0
    assert report["total_output_tokens"] == 120
    assert report["total_input_tokens"] == 240
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert report[f"mean_{metric}_ms"] > 0 and report[f"p99_{metric}_ms"] > 0
