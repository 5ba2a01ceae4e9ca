"""The engine of many machines, on a cluster of two nodes on this one, of which one is killed in the middle."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from fluxonnx.batch import cluster, local
from fluxonnx.batch.making import make_pictures
from fluxonnx.batch.painter import Painter, close
from fluxonnx.batch.rows import read_rows
from fluxonnx.errors import FluxonnxError, UsageError
from tests.batch.support import table

MODEL = Path(__file__).parents[2] / "models/tiny-klein"
PICTURES = 200


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "is no address: write auto, local or HOST:PORT"),
        ("host:0", "is no address"),
        ("host:99999", "is no address"),
        (":6379", "is no address"),
        ("http://host/:80", "is no address"),
        ("ray://host:10001", "ray:// addresses are not supported"),
    ],
)
def test_wrong_addresses(address, message):
    with pytest.raises(UsageError, match=message):
        cluster.engine(address)


def test_numbers_of_workers_and_processors():
    for options in ({"workers": 0}, {"cpus": -1}, {"cpus": 5000}):
        with pytest.raises(UsageError, match="must be from 1"):
            cluster.engine(**options)


def test_processors_are_divided():
    """A head node without processors draws nothing; a larger node holds several workers."""
    nodes = {"head": 0, "small": 4, "large": 9}
    assert cluster.share(nodes, None) == (4, {"small": 1, "large": 2})
    assert cluster.share(nodes, 8) == (8, {"large": 1})
    with pytest.raises(FluxonnxError, match=r"no node of the cluster has 10 processors: .* at most --threads 9"):
        cluster.share(nodes, 10)
    with pytest.raises(FluxonnxError, match="--num-cpus above 0"):
        cluster.share({"head": 0}, None)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'pip install "fluxonnx\[ray\]"'):
        cluster.engine()


@pytest.mark.slow
def test_nobody_answers():
    pytest.importorskip("ray.data")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        port = closed.getsockname()[1]
        with pytest.raises(FluxonnxError, match=f"can't connect to Ray at 127.0.0.1:{port}: .*refused"):
            next(cluster.engine(f"127.0.0.1:{port}")(Painter(), [{"row": 1, "prompt": "a", "seed": 1}]))


@pytest.fixture
def nodes(monkeypatch):
    """A cluster, and its second node."""
    pytest.importorskip("ray.data")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    # A node that is killed is noticed after two seconds, not after half a minute.
    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    }
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    running = Cluster(initialize_head=True, head_node_args={**node, "_system_config": health})
    session = running.head_node.get_session_dir_path()
    try:
        yield running, running.add_node(**node)
    finally:
        ray.shutdown()
        running.shutdown()
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a cluster of several nodes on one machine")
def test_a_node_killed_in_the_middle(nodes, tmp_path, capfd):
    """Each picture is there once, and byte for byte what one machine makes."""
    running, second = nodes
    model = Path(shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.png", "training")))
    painter = Painter(model, threads=1)
    painter.open()  # exports it
    colours = ("red", "green", "blue", "yellow")
    prompts = [
        {"prompt": f"a {colours[i % 4]} circle", "width": 64, "height": 64 + 16 * (i % 2), "steps": 1 + i % 2}
        for i in range(PICTURES)
    ]
    rows = read_rows(table(tmp_path, *prompts), painter)
    seen: list[int] = []
    workers: set[str] = set()
    alive = [second]

    def watch(row, result):
        seen.append(row.number)
        workers.add(result["worker"])
        if len(workers) > 1 and len(seen) >= PICTURES // 4 and alive:
            running.remove_node(alive.pop(), allow_graceful=False)

    many = make_pictures(rows, tmp_path / "many", painter, cluster.engine(running.address), watch=watch)
    assert not alive, "only one node has drawn"
    assert (many.made, many.failed, many.first_error) == (PICTURES, 0, "")
    assert sorted(seen) == list(range(1, PICTURES + 1))
    one = make_pictures(rows, tmp_path / "one", painter, local.engine())
    close()
    assert one.made == PICTURES
    files = {path.name: path.read_bytes() for path in (tmp_path / "many").glob("*.png")}
    assert len(files) == PICTURES
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.png")}

    # The same again makes nothing; a model that no node has is told before anything is made.
    assert make_pictures(rows, tmp_path / "many", painter, cluster.engine(running.address)).kept == PICTURES
    nowhere = Painter(str(tmp_path / "nowhere"), threads=1)
    with pytest.raises(FluxonnxError, match=r"lacks what the batch needs: .*nowhere"):
        make_pictures(rows[:1], tmp_path / "wrong", nowhere, cluster.engine(running.address))
