"""Prefill against the peak of a bf16 GEMM: ours and oneDNN's products of the same model, in turns.

Needs Debian's libdnnl-dev. Prints for 512 and 4,096 tokens what prefill reaches over layer and attention FLOPs, oneDNN's
rate at 512 and 2,048 rows just before it, and their ratio."""

import argparse
import json
import os
import re
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEER = os.path.join(ROOT, "build/peers/onednn_gemm")
SECONDS = "2"


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def flops_per_prompt(model, length):
    """Of a prompt's layers: products, and attention over what each token sees."""
    with open(os.path.join(model, "config.json")) as file:
        config = json.load(file)
    hidden, layers, dim = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    return layers * (2 * length * weights + 4 * dim * heads * length * (length + 1) / 2)


def prefill(model, length):
    """tokens/s and GFLOP/s."""
    text = output(os.path.join(ROOT, "build/release/model_bench"), "--model", model, "--only", f"prefill-{length}")
    rate = float(re.search(r"([\d.]+) tokens/s", text)[1])
    return rate, rate / length * flops_per_prompt(model, length) * 1e-9


def main(model, rounds):
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.makedirs(os.path.dirname(PEER), exist_ok=True)
    source = os.path.join(ROOT, "bench/peers/onednn_gemm.cc")
    subprocess.run(["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", source, "-o", PEER, "-ldnnl"], check=True)
    for _ in range(rounds):
        for length, rows in ((512, 512), (4096, 2048)):
            peer = output(PEER, str(rows), SECONDS).strip()
            tokens, ours = prefill(model, length)
            share = 100 * ours / float(peer.split()[0])
            print(f"prefill {length:5}: {tokens:6.0f} tokens/s, {ours:5.0f} GFLOP/s = {share:3.0f} % of oneDNN's GEMM at {rows} rows ({peer})",
                  flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of build/release/model_bench --write")
    parser.add_argument("rounds", type=int, nargs="?", default=3)
    parsed = parser.parse_args()
    main(parsed.model, parsed.rounds)
