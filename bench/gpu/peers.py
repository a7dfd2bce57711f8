"""What torch and transformers reach at the shapes of gpu_bench and engine_bench, in the same run: SDPA by back end, matmul, and
generation with an offloaded KV cache.

    peers.py [JSON [MODEL [OURS_JSON ...]]]

Prints a table; JSON to the first argument. MODEL: the folder that engine_bench wrote; without it nothing is generated. With the JSON
of gpu_bench and engine_bench, their share of a peer's speed is printed where the shapes are the same."""

import json
import re
import sys
import time

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM = 32, 8, 128


def median_us(work, runs=20):
    for _ in range(3):
        work()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[runs // 2]


def generate(folder, report):
    """Decoding of one sequence by transformers: KV on the device, and offloaded to the host layer by layer."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"torch      generate: {error}")
        return
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    for context in (1024, 32768):
        prompt = torch.randint(2, model.config.vocab_size, (1, context), device="cuda")
        for name, options in (("", {}), (", offloaded cache", {"cache_implementation": "offloaded"})):
            seconds = {}
            for count in (1, 33):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
                torch.cuda.synchronize()
                seconds[count] = time.perf_counter() - begin
            us = (seconds[33] - seconds[1]) / 32 * 1e6
            report(f"transformers decode, batch 1, context {context}{name}", us, 1e6 / us, "tokens/s")


def compare(rows, paths):
    """Our rows of the same shapes, by the peers' speed."""
    ours = {(row["what"], row["unit"]): row["value"] for path in paths for row in json.load(open(path))["rows"]}
    for row in rows:
        name = re.sub(r"^matmul |^sdpa \w+ |^transformers ", "", row["what"]).replace("offloaded cache", "KV in host memory")
        value = ours.get((name, row["unit"]))
        if value is not None:
            print(f"{'share':10} {name + ' of ' + ' '.join(row['what'].split()[:2]):58} {value / row['value']:10.2f}")


def main():
    rows = []

    def report(what, us, value, unit):
        print(f"{'torch':10} {what:58} {us:10.1f} us        {value:9.2f} {unit}", flush=True)
        rows.append({"section": "torch", "what": what, "median_us": us, "value": value, "unit": unit})

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        for batch, length in ((16, 1024), (4, 4096), (1, 16384)):
            q, k, v = random(batch, HEADS, length, DIM), random(batch, KV_HEADS, length, DIM), random(batch, KV_HEADS, length, DIM)
            try:
                with sdpa_kernel(backend):
                    us = median_us(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
            except RuntimeError as error:
                print(f"torch      prefill {name}: {str(error).splitlines()[0]}")
                break
            flops = batch * length * (length + 1) / 2 * HEADS * 4 * DIM
            report(f"sdpa {name} prefill, batch {batch}, {length} new of {length}", us, flops / us * 1e-6, "TFLOP/s")
        for batch, context in ((1, 131072), (8, 16384), (64, 4096), (64, 16384)):
            q, k, v = random(batch, HEADS, 1, DIM), random(batch, KV_HEADS, context, DIM), random(batch, KV_HEADS, context, DIM)
            try:
                with sdpa_kernel(backend):
                    us = median_us(lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            except RuntimeError as error:
                print(f"torch      decode {name}: {str(error).splitlines()[0]}")
                break
            report(f"sdpa {name} decode, batch {batch}, context {context}", us, 2 * k.numel() * 2 / us * 1e-3, "GB/s")
    for name, n, k in (("qkv", 6144, 4096), ("output", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336), ("head", 128256, 4096)):
        weights = [random(n, k) for _ in range(3)]
        for m in (1, 16, 64, 512, 4096):
            if m > 512 and n > 100000:
                continue
            a, turn = random(m, k), [0]

            def work():
                turn[0] = (turn[0] + 1) % 3
                functional.linear(a, weights[turn[0]])

            us = median_us(work)
            report(f"matmul {name}, {m} rows", us, 2 * m * n * k / us * 1e-6, "TFLOP/s")
    if len(sys.argv) > 2:
        try:
            generate(sys.argv[2], report)
        except Exception as error:  # of whatever version is installed; what was measured before is kept
            print(f"torch      generate: {type(error).__name__}: {error}")
    if len(sys.argv) > 3:
        compare(rows, sys.argv[3:])
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


main()
