"""Spillway beside llama.cpp on the same weights, threads and lengths, in turns; medians and ratios.

    compare.py check       [--weights bf16 | q8_0] [--isa native | avx2]
    compare.py WORKLOAD... [--weights bf16 | q8_0] [--isa native | avx2] [--rounds 3] [--seconds 150]
    compare.py table       [--weights bf16 | q8_0] [--isa native | avx2]

check: the same greedy tokens, and log probabilities that are close. WORKLOAD: prefill-512, prefill-4096, decode-1,
decode-16, decode-32: model_bench and llama.cpp's library, without a server on either side, and llama-bench where it has
the workload; serve-1, serve-16, serve-32: `spillway serve` and llama-server under `spillway bench serve`, output tokens a
second. A workload starts no further round that would end after --seconds. With q8_0, Spillway runs twice: with
--quantization int8 and as stored. Results stay in build/peers, and table prints what is there.

Needs `make bench` and build_llama_cpp.sh. Run it on a machine that does nothing else.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from local_server import ROOT, THREADS, Server, run, running  # noqa: E402

PEERS = ROOT / "build" / "peers"
MODEL_BENCH = ROOT / "build" / "release" / "model_bench"
# name: clients, tokens in, tokens out
WORKLOADS = {
    "prefill-512": (1, 512, 1),
    "prefill-4096": (1, 4096, 1),
    "decode-1": (1, 32, 256),
    "decode-16": (16, 32, 256),
    "decode-32": (32, 32, 256),
    "serve-1": (1, 32, 256),
    "serve-16": (16, 32, 256),
    "serve-32": (32, 32, 256),
}
ROUNDS_SERVED = 2  # requests of each client
# The fastest of its peers on 2 Zen 5 cores, another machine: tokens/s of this model.
ELSEWHERE = {
    "bf16": {"prefill-512": "1,573 (ik_llama.cpp)", "prefill-4096": "908 (ik_llama.cpp)",
             "decode-1": "103 (ik_llama.cpp)", "decode-16": "305 (llama.cpp)", "decode-32": "208 (llama.cpp)"},
    "q8_0": {"prefill-512": "1,833 (ik_llama.cpp)", "prefill-4096": "1,788 (ik_llama.cpp)",
             "decode-1": "180 to 204 (ik_llama.cpp)", "decode-16": "341 (ik_llama.cpp)",
             "decode-32": "417 (ik_llama.cpp)"},
}
COUNT = 16  # greedy tokens compared
CLOSE = 0.1  # of log probabilities, in nats: bf16 products of 1,024 in another order


def results_path(args):
    return PEERS / f"results-{args.weights}-{args.isa}.json"


def results(args):
    path = results_path(args)
    return json.loads(path.read_text()) if path.exists() else {}


def save(args, key, value):
    results_path(args).write_text(json.dumps(results(args) | {key: value}, indent=1) + "\n")


def llama(args, program):
    return PEERS / f"llama-{args.isa}" / "bin" / program


def llama_decode(args):
    return llama(args, "llama_decode")


def spillway_model():
    folder = PEERS / "model"
    if not (folder / "model.safetensors").exists():
        run(MODEL_BENCH, "--write", folder)
    return folder


def gguf(args):
    """model-bf16.gguf by our script; model-q8_0.gguf from it by llama.cpp's own rounding."""
    bf16 = PEERS / "model-bf16.gguf"
    if not bf16.exists():
        run("python3", Path(__file__).with_name("gguf_from_safetensors.py"), spillway_model(), bf16)
    q8 = PEERS / "model-q8_0.gguf"
    if args.weights == "q8_0" and not q8.exists():
        run(llama_decode(args), "quantize", bf16, q8)
    return bf16 if args.weights == "bf16" else q8


def target(args):
    return "auto" if args.isa == "native" else args.isa


def quantizations(args):
    return {"spillway": "none"} | ({"spillway int8": "int8"} if args.weights == "q8_0" else {})


def served(server, clients, tokens_in, tokens_out):
    server.await_ready()
    server.load(clients, clients, tokens_in, 16)
    return server.load(clients, ROUNDS_SERVED * clients, tokens_in, tokens_out)["output_throughput"]


def servers(args, clients, tokens_in, tokens_out):
    def ours(quantization):
        with running(spillway_model(), "--cpu-target", target(args), "--quantization", quantization) as server:
            return served(server, clients, tokens_in, tokens_out)

    def theirs():
        context = clients * (tokens_in + tokens_out + 64)
        server = Server([llama(args, "llama-server"), "--model", gguf(args), "--threads", THREADS, "--parallel", clients,
                         "--ctx-size", context, "--log-disable"])
        try:
            return served(server, clients, tokens_in, tokens_out)
        finally:
            server.stop()

    mine = {which: (lambda each=quantization: ours(each)) for which, quantization in quantizations(args).items()}
    return mine | {"llama.cpp": theirs}


def engines(args, name):
    """name: function of no arguments, which measures tokens/s."""
    clients, tokens_in, tokens_out = WORKLOADS[name]
    if name.startswith("serve"):
        return servers(args, clients, tokens_in, tokens_out)

    def ours(quantization):
        with tempfile.NamedTemporaryFile() as file:
            run(MODEL_BENCH, "--model", spillway_model(), "--only", name, "--target", target(args), "--quantization",
                quantization, "--json", file.name)
            report = json.load(file)
            result = report["results"][0]
        print(f"  {report['device']} {quantization}: {result['value']:.1f}, {result['percent']:.1f} {result['of']}; "
              f"read {report['read_gigabytes']:.1f} GB/s, bf16 {report['bf16_gigaflops']:.0f} GFLOP/s", flush=True)
        return result["value"]

    def theirs():
        text = run(llama_decode(args), "speed", gguf(args), THREADS, clients, tokens_in, tokens_out)
        return json.loads(text.splitlines()[-1])["prefill" if tokens_out == 1 else "decode"]

    def llama_bench():
        length = ["-p", tokens_in, "-n", 0] if tokens_out == 1 else ["-p", 0, "-n", tokens_out]
        text = run(llama(args, "llama-bench"), "-m", gguf(args), "-t", THREADS, "-r", 1, "-o", "json", *length)
        return json.loads(text)[0]["avg_ts"]

    mine = {which: (lambda each=quantization: ours(each)) for which, quantization in quantizations(args).items()}
    peers = {"llama.cpp": theirs} | ({"llama-bench": llama_bench} if clients == 1 else {})
    return mine | peers


def measure(args, name):
    measures = engines(args, name)
    begin = time.monotonic()
    rates = {}
    for turn in range(args.rounds):
        if turn > 0 and (time.monotonic() - begin) * (turn + 1) / turn > args.seconds:
            break
        for which, tokens_per_second in measures.items():
            rates.setdefault(which, []).append(tokens_per_second())
    save(args, name, rates)
    for which, values in rates.items():
        print(f"{name:13} {which:14} {statistics.median(values):8.1f} tokens/s of "
              f"{', '.join(f'{value:.1f}' for value in values)}", flush=True)


def greedy(server, prompt):
    """[[token, {token: log probability}], ...] of the likeliest continuation."""
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": COUNT, "temperature": 0, "logprobs": 5,
                                             "ignore_eos": True})
    found = answer["choices"][0]["logprobs"]
    special = {"<s>": "256", "</s>": "257"}
    id_of = lambda text: special.get(text) or re.sub(r"^ w(\d+)$", r"\1", text)  # noqa: E731; bytes match nothing
    return [[id_of(token), {id_of(each): value for each, value in top.items()}]
            for token, top in zip(found["tokens"], found["top_logprobs"])]


def check(args):
    """Exits with an error where the two do not compute the same model."""
    draw = random.Random(1)
    prompts = [[draw.randrange(300, 32000) for _ in range(length)] for length in (1, 7, 32, 100, 300, 700)]
    command = [llama_decode(args), "greedy", gguf(args), THREADS, COUNT]
    lines = "".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts)
    peer = subprocess.run(list(map(str, command)), input=lines, check=True, capture_output=True, text=True).stdout
    quantization = list(quantizations(args).values())[-1]
    largest = 0.0
    with running(spillway_model(), "--cpu-target", target(args), "--quantization", quantization) as server:
        for prompt, line in zip(prompts, peer.splitlines()):
            same = 0
            for (token, top), (peer_token, peer_top) in zip(greedy(server, prompt), json.loads(line)):
                largest = max([largest] + [abs(top[each] - peer_top[each]) for each in top.keys() & peer_top.keys()])
                if token != str(peer_token):
                    gap = top[token] - top.get(str(peer_token), -float("inf"))
                    print(f"  {gap:.4f} between the two where they part")
                    if args.weights == "bf16" and gap > CLOSE:
                        raise SystemExit(f"after {same} tokens: {token}, llama.cpp {peer_token}")
                    break
                same += 1
            print(f"prompt of {len(prompt)}: {same} of {COUNT} tokens the same", flush=True)
    print(f"log probabilities differ by at most {largest:.4f}")
    if args.weights == "bf16" and largest > CLOSE:
        raise SystemExit(f"more than {CLOSE}")


def table(args):
    found = results(args)
    mine = list(quantizations(args))
    heads = [*mine, f"llama.cpp {args.weights}", "ratio", "fastest peer elsewhere"]
    if len(mine) == 2:
        heads.insert(2, "int8 of bf16")
    print(f"| tokens/s | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name in filter(found.__contains__, WORKLOADS):
        medians = {which: statistics.median(values) for which, values in found[name].items()}
        cells = [f"{medians[which]:,.0f}" for which in mine]
        if len(mine) == 2:
            cells.append(f"{medians[mine[1]] / medians[mine[0]]:.2f} x")
        peer = max(medians[which] for which in medians if which not in mine)
        cells += [f"{peer:,.0f}", f"{medians[mine[-1]] / peer:.2f} x", ELSEWHERE[args.weights].get(name, "")]
        print(f"| {name} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["check", "table", *WORKLOADS])
    parser.add_argument("--weights", choices=["bf16", "q8_0"], default="bf16")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=150)
    args = parser.parse_args()
    for what in args.what:
        if what in WORKLOADS:
            measure(args, what)
        else:
            {"check": check, "table": table}[what](args)


if __name__ == "__main__":
    main()
