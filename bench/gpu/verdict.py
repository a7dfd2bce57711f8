"""The bars of the cuda device, from the JSON of gpu_bench, engine_bench and peers.py.

    verdict.py FOLDER

Prints one line per bar, writes them to FOLDER/verdict.txt, and fails unless all are met. A file that is missing leaves its bars
unmeasured."""

import json
import os
import re
import sys

LONG_CONTEXT = 32768  # tokens
IDLE_US = 20  # what the two small copies between steps may take; a host in between takes more


def rows_of(folder, name):
    path = os.path.join(folder, name)
    return json.load(open(path))["rows"] if os.path.exists(path) else []


def shares(rows, pattern):
    """(value / limit, what) of the rows whose section and name match and that have a limit."""
    found = [row for row in rows if re.fullmatch(pattern, f"{row['section']}: {row['what']}") and row.get("limit")]
    return [(row["value"] / row["limit"], row["what"]) for row in found]


def values(rows, pattern):
    return {row["what"]: row["value"] for row in rows if re.fullmatch(pattern, row["what"])}


def gather(kernels, _engine, _peers):
    found = shares(kernels, r"gather: rows of 512 B, .*")
    return [max(found)] if found else []


def decode_attention(kernels, _engine, _peers):
    found = shares(kernels, r"attention: decode, batch \d+, context \d+")
    return [each for each in found if int(each[1].rsplit(" ", 1)[1]) >= LONG_CONTEXT]


def prefill_attention(back_end):
    def measure(kernels, _engine, peers):
        ours = values(kernels, r"prefill, .*")
        theirs = values(peers, rf"sdpa {back_end} prefill, .*")
        pairs = [(what, f"sdpa {back_end} {what}") for what in ours]
        return [(ours[what] / theirs[other], what) for what, other in pairs if other in theirs]

    return measure


def gemm(kernels, _engine, _peers):
    return shares([row for row in kernels if row["unit"] == "TFLOP/s"], r"gemm: .*")


def offloaded(_kernels, engine, peers):
    ours = values([row for row in engine if row["unit"] == "tokens/s"], r"decode, .*, KV in host memory")
    theirs = values(peers, r"transformers decode, .*, offloaded cache")
    pairs = [(what, "transformers " + what.replace("KV in host memory", "offloaded cache")) for what in ours]
    return [(ours[what] / theirs[other], what) for what, other in pairs if other in theirs]


def idle(_kernels, engine, _peers):
    found = [row for row in engine if re.fullmatch(r"decode, batch \d+, context \d+, idle between", row["what"])]
    return [(row["median_us"], row["what"]) for row in found]


# Name, what is measured, whether it must reach the bar or stay below it, the bar. The worst of the measured counts.
BARS = [
    ("gather of 512 B rows / pinned copy", gather, min, 0.85),
    (f"decode attention / memory bandwidth, context {LONG_CONTEXT} on", decode_attention, min, 0.85),
    ("prefill attention / SDPA, flash", prefill_attention("flash"), min, 0.8),
    ("prefill attention / SDPA, cuDNN", prefill_attention("cudnn"), min, 0.8),
    ("GEMM / cuBLAS", gemm, min, 0.9),
    ("decode, KV in host memory / transformers, offloaded cache", offloaded, min, 3.0),
    ("us without a kernel between overlapped decode steps", idle, max, IDLE_US),
]


def judge(kernels, engine, peers):
    """Lines, and whether every bar is met."""
    lines, all_met = [], True
    for name, measure, worst, bar in BARS:
        found = measure(kernels, engine, peers)
        if not found:
            lines.append(f"{name:62} not measured")
            all_met = False
            continue
        value, what = worst(found)
        is_met = value >= bar if worst is min else value <= bar
        all_met = all_met and is_met
        sign = ">=" if worst is min else "<="
        lines.append(f"{name:62} {value:8.2f} {sign} {bar:<5} {'met' if is_met else 'MISSED'}   worst of {len(found)}: {what}")
    return lines, all_met


def main(folder):
    lines, all_met = judge(*(rows_of(folder, name) for name in ("gpu_bench.json", "engine_bench.json", "gpu_peers.json")))
    with open(os.path.join(folder, "verdict.txt"), "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
