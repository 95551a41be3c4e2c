"""Measures scans of many models: two processes against one, and a Ray cluster that loses a node.

    python bench/fleet.py processes [--models 100] [--rounds 1] [--budget fast]
    python bench/fleet.py ray [--models 24] [--nodes 3] [--budget fast]

The models are copies of those of zoo/cifar10-w8 with slightly different weights, so that no result can be taken from
another one; the clean images are those of zoo/demo/defence.npz. Each process computes in one thread.

``processes`` runs `bdprune scan` with one and with two workers in turn. It prints the wall time and the CPU time of
each run, and the ratio of the shortest wall times. The target on two free cores is 1.7; it exits with 1 below it. If
other work takes the cores, only the CPU times can be compared: they should be about equal.

``ray`` scans the models in this process, then on a cluster of several nodes of one core on this machine, one of which
is killed when half of the results are there. It compares what `bdprune export` writes of both, sorted and without
times, prints whether they are equal, and exits with 1 if they are not. It needs the extra ``cluster``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from changed import changed_copies

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "zoo" / "demo" / "defence.npz"
TARGET = 1.7


def timed(folder: Path, workers: int, budget: str) -> tuple[float, float]:
    """Seconds of wall time and of CPU time of a scan from the command line."""
    command = [sys.executable, "-m", "bdprune", "scan", str(folder), "--data", str(IMAGES), "--budget", budget]
    command += ["--executor", "processes", "--workers", str(workers), "-q", "--exit-zero", "-f", "jsonl"]
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds, after = time.perf_counter() - start, os.times()
    failed = sum(json.loads(line).get("verdict") == "error" for line in done.stdout.splitlines())
    if failed:
        raise SystemExit(f"{failed} scans failed.")
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, busy


def compare_processes(models: int, rounds: int, budget: str) -> int:
    """Prints the times and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        changed_copies(Path(name), models)
        found: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for workers, times in found.items():
                seconds, busy = timed(Path(name), workers, budget)
                times.append(seconds)
                print(f"{models} models, {workers} at a time: {seconds:.1f} s, {busy:.1f} s of CPU", flush=True)
    ratio = min(found[1]) / min(found[2])
    print(f"two processes are {ratio:.2f} times as fast as one; the target is {TARGET}")
    return 0 if ratio >= TARGET else 1


def compare_ray(models: int, nodes: int, budget: str) -> int:
    """Prints whether the exports are equal."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = changed_copies(folder / "models", models)
        inline = _exported(files, folder / "inline", budget)
        cluster = _started(nodes)
        try:
            lossy = _exported(files, folder / "ray", budget, cluster)
        finally:
            cluster.shutdown()
    equal = sorted(inline) == sorted(lossy) and len(inline) == models
    print(f"{len(inline)} and {len(lossy)} results; equal but for times: {'yes' if equal else 'no'}")
    return 0 if equal else 1


def _started(nodes: int) -> Any:
    """A cluster whose head has no cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, **small)
    return cluster


def _exported(files: Sequence[Path], name: Path, budget: str, cluster: Any = None) -> list[str]:
    """The lines of the export of a scan, without times; with a cluster, one of its nodes is killed half-way."""
    import bdprune
    from bdprune.store import Store, export

    address, store = cluster.address if cluster else None, name.with_suffix(".db")
    with bdprune.Scanner(IMAGES, budget=budget, address=address, store=store) as scanner:
        for count, _ in enumerate(scanner.scan_many(files), 1):
            if cluster and count == len(files) // 2:
                _kill_a_node(cluster)
    with Store(store, writes=False) as found:
        export([found], "jsonl", name.with_suffix(".jsonl"))
    return [json.dumps(_timeless(json.loads(line))) for line in name.with_suffix(".jsonl").open()]


def _kill_a_node(cluster: Any) -> None:
    """Kills a node to which this process is not connected."""
    import ray

    mine = ray._private.worker._global_node.raylet_socket_name
    chosen = next(one for one in cluster.worker_nodes if one.raylet_socket_name != mine)
    cluster.remove_node(chosen, allow_graceful=False)
    print("killed a node", flush=True)


def _timeless(value: Any) -> Any:
    """The value without the entries that are times."""
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in ("started", "seconds")}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def main() -> int:
    """Runs one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["processes", "ray"])
    parser.add_argument("--models", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--budget", default="fast")
    chosen = parser.parse_args()
    if chosen.what == "processes":
        return compare_processes(chosen.models or 100, chosen.rounds, chosen.budget)
    return compare_ray(chosen.models or 24, chosen.nodes, chosen.budget)


if __name__ == "__main__":
    sys.exit(main())
