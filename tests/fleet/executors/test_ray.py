"""Models on a Ray cluster: several nodes on this machine, nodes and workers that die, and a cluster for one run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bdprune
from bdprune.errors import OptionError
from bdprune.fleet.executors import ray as module
from bdprune.fleet.executors.inline import InlineExecutor, Limits
from bdprune.fleet.executors.ray import RayExecutor
from bdprune.fleet.scans import Scanner, scan_many
from bdprune.model import build
from bdprune.pipeline import CleanSource, Job, Options
from bdprune.store import Store

from .helpers import Odd, becomes_true, is_alive, without_times

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own files and processes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


SMALL = {"object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of a head without cores and three nodes of one core each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install bdprune[cluster]")
    from ray.cluster_utils import Cluster

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
        for _ in range(3):
            found.add_node(num_cpus=1, **SMALL)
    yield found
    found.shutdown()
    signal.signal(signal.SIGTERM, before)


def another_node(cluster: Any) -> Any:
    """A node to which this process is not connected."""
    import ray

    mine = ray._private.worker._global_node.raylet_socket_name
    return next(one for one in cluster.worker_nodes if one.raylet_socket_name != mine)


def exported(store: Path) -> list[tuple[Any, ...]]:
    """The lines of ``bdprune export``, sorted, without times."""
    with Store(store, writes=False) as found:
        return sorted((one.name, one.model, str(one.settings), without_times(one.results)) for one in found.scans())


def running(odd: Odd, before: int) -> set[float]:
    """The models that have started and are not done, among the later notes."""
    notes = odd.notes()[before:]
    return {one for what, one, _, _ in notes if what == "start"} - {one for what, one, _, _ in notes if what == "end"}


def lose_a_node(odd: Odd, cluster: Any, before: int) -> None:
    """Kills a node while each of the three holds a model, and lets the others go on once its worker is dead."""
    assert becomes_true(lambda: len(running(odd, before)) == 3, 120)
    workers = odd.processes() - {os.getpid()}
    cluster.remove_node(another_node(cluster), allow_graceful=False)
    assert becomes_true(lambda: not all(map(is_alive, workers)), 60)
    (odd.folder / "hold").unlink()


def test_a_lost_node_changes_no_result(
    odd: Odd, cluster: Any, one_thread: None, capfd: pytest.CaptureFixture[str]
) -> None:
    files = odd.files(0.1, 0.6, 0.15, 0.7, 0.12, 0.65, 0.11, 0.61, 0.16)
    files[4].write_bytes(b"nonsense")
    list(scan_many(files, store=odd.folder / "inline.db", **odd.options))
    before = len(odd.notes())
    (odd.folder / "hold").write_text("0.65 0.11 0.61 0.16")
    with Scanner(address=cluster.address, store=odd.folder / "ray.db", **odd.options) as scanner:
        found = []
        for result in scanner.scan_many(files):
            found.append(result)
            if len(found) == 5:
                lose_a_node(odd, cluster, before)
    cluster.add_node(num_cpus=1, **SMALL)
    assert [one.name for one in found] == [str(file) for file in files]
    started = [bias for what, bias, _, _ in odd.notes()[before:] if what == "start"]
    assert len(started) > len(set(started)) == 8, "a model started again"
    assert exported(odd.folder / "ray.db") == exported(odd.folder / "inline.db")
    assert capfd.readouterr().out == ""


def test_a_model_that_kills_each_worker_becomes_an_error(odd: Odd, cluster: Any) -> None:
    files = odd.files(0.1, 0.4, 0.6)
    found = list(scan_many(files, address=cluster.address, **odd.options))
    assert [one.verdict for one in found] == ["inconclusive", "error", "suspicious"]
    error = found[1].error
    assert error and "died 3 times" in error.message and "--memory-limit" in error.hint
    assert [bias for what, bias, _, _ in odd.notes() if what == "start"].count(0.4) == 3


def test_limits_hold_on_the_cluster(odd: Odd, cluster: Any) -> None:
    files = odd.files(0.2, 0.4, 0.6)
    options = odd.options | {"timeout": 25, "memory_limit": 1 << 30}
    found = list(scan_many(files, address=cluster.address, **options))
    assert [one.error and one.error.type for one in found] == [
        "TimeLimitError",
        "ArtifactError",
        None,
    ]
    assert becomes_true(lambda: not any(map(is_alive, odd.processes())))


def test_models_in_memory_and_stacks_run_on_the_cluster(odd: Odd, cluster: Any) -> None:
    class Local(type(odd.tiny.module)):  # type: ignore[misc]
        """A class that a node knows only from this process."""

    local = Local()
    local.load_state_dict(odd.tiny.module.state_dict())
    unpicklable = Local()
    unpicklable.lock = threading.Lock()
    options = odd.options | {"stack": 2}
    found = list(scan_many([*odd.files(0.6), local, unpicklable], address=cluster.address, **options))
    assert [one.verdict for one in found] == ["suspicious", "inconclusive", "error"]
    assert found[2].error and "cannot be sent to a Ray cluster" in found[2].error.message


def test_an_open_connection_is_used_and_stays_open(odd: Odd, cluster: Any) -> None:
    import ray

    ray.init(cluster.address, log_to_driver=False)
    try:
        handler = signal.getsignal(signal.SIGTERM)
        assert [one.verdict for one in scan_many(odd.files(0.1), executor="ray", **odd.options)] == ["inconclusive"]
        assert ray.is_initialized() and signal.getsignal(signal.SIGTERM) is handler
    finally:
        ray.shutdown()


def test_two_runs_at_the_same_time_share_the_connection(odd: Odd, cluster: Any) -> None:
    import ray

    files = odd.files(0.1, 0.6)
    first, second = (scan_many(files, address=cluster.address, **odd.options) for _ in range(2))
    assert [next(first).verdict, next(second).verdict] == ["inconclusive"] * 2
    assert [one.verdict for one in first] == ["suspicious"] and ray.is_initialized()
    assert [one.verdict for one in second] == ["suspicious"] and not ray.is_initialized()


def test_nodes_with_another_version_give_no_results(odd: Odd, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bdprune, "__version__", "9")
    (found,) = scan_many(odd.files(0.1), address=cluster.address, **odd.options)
    assert found.error and found.error.type == "ClusterError" and "the run was started with 9" in found.error.message


def test_an_early_end_cancels_the_tasks(odd: Odd, cluster: Any) -> None:
    files = odd.files(0.1, 0.2, 0.2, 0.2)
    stream = scan_many(files, address=cluster.address, **odd.options)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert becomes_true(lambda: not any(map(is_alive, odd.processes())))


def daemons() -> set[str]:
    """The processes of Ray on this machine."""
    found = set()
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if any(word in one.read_bytes() for word in (b"raylet", b"gcs_server", b"ray::")):
                found.add(one.parent.name)
    return found


def test_without_an_address_a_cluster_lives_as_long_as_the_run(
    odd: Odd, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On the machine of the store, tasks also take evidence from it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install bdprune[cluster]")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(build("resnet18_cifar", 3, width=4).state_dict(), odd.folder / "known.pth")
    before, handler = daemons(), signal.getsignal(signal.SIGTERM)
    options = odd.options | {"arch": None, "input_shape": None, "store": odd.folder / "scans.db"}
    list(scan_many([odd.folder / "known.pth"], **options))
    notes = odd.notes()
    options["detectors"] = [*options["detectors"], bdprune.detector("lipschitz")]
    (found,) = scan_many([odd.folder / "known.pth"], executor="ray", workers=1, **options)
    assert len(found.detectors) == 2 and odd.notes() == notes
    assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) is handler
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    assert becomes_true(lambda: daemons() <= before)
    assert capfd.readouterr().out == ""


def test_an_absent_ray_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match="Ray cannot be used") as caught:
        Scanner(executor="ray")
    assert caught.value.hint == "Run: pip install bdprune[cluster]"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts as installed; these tests do not reach it."""
    monkeypatch.setattr(module, "_imported", lambda: types.SimpleNamespace(is_initialized=lambda: False))


@pytest.mark.parametrize("address", ["", " ", "ray://head:10001", "head", "head:", ":6379", "head:port", "a b:1"])
def test_an_invalid_address_is_an_error(no_ray: None, address: str) -> None:
    with pytest.raises(OptionError, match="Invalid address of a Ray cluster"):
        RayExecutor(InlineExecutor(), address=address)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "[::1]:9"])
def test_a_cluster_that_does_not_answer_is_an_error(no_ray: None, address: str) -> None:
    executor = RayExecutor(InlineExecutor(), Limits(), address=address)
    with pytest.raises(OptionError, match="No Ray cluster at") as caught:
        list(executor.run([], Job(CleanSource(None), [], Options()), lambda stage: None))
    assert "documentation of Ray" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 5000, "many"])
def test_an_invalid_number_of_tasks_is_an_error(no_ray: None, workers: Any) -> None:
    with pytest.raises(OptionError, match="Invalid number of workers"):
        RayExecutor(InlineExecutor(), workers=workers)
