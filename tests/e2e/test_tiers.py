"""The tiers below the device, from outside: sequences that exceed the device tier, files after a crash, an ordinary account."""

import concurrent.futures
import itertools
import os
import pathlib
import re
import resource

import httpx2 as httpx
import pytest
from conftest import MODEL_NAME, Server

LONG = " ".join(f"Item {i} is kept in box {i * 7919 % 1000}." for i in range(120))


def complete(server, prompt, max_tokens=24):
    answer = httpx.post(server.url + "/v1/completions", timeout=120,
                        json={"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                              "ignore_eos": True, "logprobs": 1})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_a_sequence_beyond_the_device_tier_streams_over_a_paced_link():
    """40 blocks of 64 KiB on the device; the prompt is more than twice that."""
    ample = Server(built_in_model=True)
    expected = complete(ample, LONG)
    assert ample.metric("spillway_kv_streamed_bytes_total") == 0
    ample.stop()
    small = Server("--kv-offloading-size", "64MiB", "--cpu-link-bandwidth", "500MB", built_in_model=True, kv_cache="2560KiB")
    assert complete(small, LONG) == expected
    assert small.metric("spillway_kv_streamed_bytes_total") > 0
    assert small.metric("spillway_kv_moved_home_bytes_total") > 0
    assert small.metric("vllm:kv_offload_lookup_sync_delay_seconds_count") > 0
    small.signal()
    assert small.wait() == 0


def test_kill_9_while_blocks_are_spilled_then_a_restart(tmp_path):
    prompts = [f"Story {i}. " + " ".join(f"The {i + j} dogs and {i * j} cats." for j in range(40)) for i in range(24)]
    plain = Server("--kv-offloading-size", "0", built_in_model=True)
    expected = [complete(plain, prompt) for prompt in prompts]
    plain.stop()
    shared_memory = set(os.listdir("/dev/shm"))
    directory = tmp_path / "kv"
    flags = ["--kv-offloading-size", "6MiB", "--kv-file-directory", directory, "--kv-file-size", "64MiB"]
    for kills in range(3):
        server = Server(*flags, built_in_model=True, kv_cache="4MiB")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            work = [pool.submit(complete, server, prompt) for prompt in prompts]
            while server.metric("spillway_kv_copied_blocks_total", kind="store") < 60 + 100 * kills:
                if all(each.done() for each in work):
                    work = [pool.submit(complete, server, prompt) for prompt in prompts]
            server.process.kill()  # SIGKILL
            for each in work:
                if each.exception() is None:
                    assert each.result() in expected
        server.stop()
        assert all(path.stat().st_mode & 0o077 == 0 for path in directory.iterdir())
    server = Server(*flags, built_in_model=True, kv_cache="4MiB")
    assert server.metric("spillway_kv_resident_blocks", tier="file") > 0
    assert [complete(server, prompt) for prompt in prompts] == expected
    came_back = server.metric("spillway_kv_hits_total", tier="file")
    assert came_back > 0, "nothing of the killed process's was used"
    assert server.metric("spillway_kv_checksum_failures_total", tier="file") == 0
    assert server.metric("vllm:kv_offload_tiering_chunk_hits_total", tier="1:fs") == came_back
    shown = server.get("/metrics").text
    for usage in ("read", "write"):
        assert f"vllm:kv_offload_tiering_primary_{usage}_usage_perc{{" in shown
    assert server.metric("vllm:kv_offload_cpu_allocation_size_sum") > 0
    server.signal()
    assert server.wait() == 0
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.fixture
def cgroup():
    """Limits a cgroup's memory; what it returns makes processes members. Only some machines and accounts may have one."""
    version_1 = pathlib.Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else version_1.parent) / f"spillway-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")

    def limit(num_bytes):
        try:
            (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(num_bytes))
        except OSError as error:
            pytest.skip(f"its memory cannot be limited: {error}")
        return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield limit
    finally:
        group.rmdir()


def test_a_cgroup_of_2_gib_sizes_the_host_tier_and_refuses_what_does_not_fit(cgroup):
    join = cgroup(2 << 30)
    server = Server(built_in_model=True, preexec=join)
    assert 256 << 20 < server.metric("spillway_kv_capacity_bytes", tier="host") < 512 << 20
    assert complete(server, LONG)[0]
    server.signal()
    assert server.wait() == 0
    with pytest.raises(AssertionError, match="3 GiB do not fit: the cgroup's limit is 2 GiB"):
        Server("--kv-offloading-size", "3GiB", built_in_model=True, preexec=join)


def test_the_largest_host_tier_that_a_cgroup_takes_can_be_filled(cgroup):
    join = cgroup(192 << 20)
    with pytest.raises(AssertionError, match="200 MiB do not fit") as refusal:
        Server("--kv-offloading-size", "200MiB", built_in_model=True, kv_cache="4MiB", preexec=join)
    room = float(re.search(r"which leaves ([0-9.]+) MiB", str(refusal.value))[1])
    server = Server("--kv-offloading-size", f"{int(0.99 * room * 1024)}KiB", built_in_model=True, kv_cache="4MiB", preexec=join)
    expected = complete(server, LONG)
    story = itertools.count()

    def add():
        complete(server, " ".join(str(next(story) * 7919) for _ in range(400)), max_tokens=1)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        while server.metric("spillway_kv_evictions_total", tier="host") == 0:
            for each in [pool.submit(add) for _ in range(8)]:
                each.result()
    capacity = server.metric("spillway_kv_capacity_bytes", tier="host")
    assert server.metric("spillway_kv_resident_bytes", tier="host") > 0.95 * capacity > 0.9 * 0.95 * room * 2**20
    assert complete(server, LONG) == expected
    server.signal()
    assert server.wait() == 0


def test_an_ordinary_account_with_64_kib_of_locked_memory():
    def become_ordinary():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

    server = Server(preexec=become_ordinary)
    status = pathlib.Path(f"/proc/{server.process.pid}/limits").read_text()
    assert "65536" in next(line for line in status.splitlines() if line.startswith("Max locked memory"))
    assert any('"tiers checked' in line for line in server.lines)
    assert any('"host tier placed' in line or "touched first" in line for line in server.lines)
    assert complete(server, "Once upon a time")[0]
    server.signal()
    assert server.wait() == 0
