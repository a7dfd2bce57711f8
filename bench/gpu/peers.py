"""What torch reaches at the shapes of gpu_bench, in the same run: SDPA by back end, and matmul. Prints a table; JSON to argv[1]."""

import json
import sys

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
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


main()
