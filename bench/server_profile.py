"""CPU time of a server's threads per step, by what they are named: what text and SSE cost beside the engine.

    server_profile.py FOLDER [--quantization none | int8]

Needs `make build`. At 1, 16 and 32 clients, 32 tokens in and 256 out.
"""

import argparse
import collections
from pathlib import Path

from local_server import running

CLIENTS = (1, 16, 32)
NAMES = {"engine": "engine", "service": "service: tokens to text, JSON", "http": "http: SSE, sockets"}


def cpu_seconds(pid):
    """By thread name."""
    seconds = collections.Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        seconds[NAMES.get(name, "the rest: kernels")] += int((task / "schedstat").read_text().split()[0]) * 1e-9
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    args = parser.parse_args()
    columns = []
    with running(args.folder, "--quantization", args.quantization) as server:
        server.load(1, 1, 32, 8)
        for clients in CLIENTS:
            before = cpu_seconds(server.process.pid)
            server.load(clients, clients, 32, 256)
            after = cpu_seconds(server.process.pid)
            columns.append({name: (after[name] - before[name]) / 256 * 1e6 for name in after})
    print("| CPU microseconds a step | " + " | ".join(map(str, CLIENTS)) + " |\n|---|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:,.0f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
