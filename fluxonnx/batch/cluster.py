"""The engine of many machines: Ray Data over a pool of actors, each with a share of a machine's processors.

Pictures come back to the process that runs the batch, so the machines need no folder in common. A node may go away at
any time: Ray runs what it had on the others, and what Ray gives up is run again here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxonnx.batch.names import ROW_KEYS
from fluxonnx.batch.painter import PROMPTS_AHEAD, Painter, worker_name
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.machine import MOST_THREADS
from fluxonnx.version import __version__

Values = Mapping[str, Any]
Result = Mapping[str, Any]

LOCAL, AUTO = "local", "auto"
# Seconds in which a head node has to answer at all: Ray itself would try for two minutes, and then end the process.
ANSWER_TIME = 10
# Passes over rows for which nothing came back, such as those of a node that took the last copy of its pictures along.
MOST_PASSES = 3
# More blocks than this cost more to keep than they are good for.
MOST_BLOCKS = 100_000
# So many blocks at least for each worker, so that all end about together.
BLOCKS_PER_WORKER = 4


def engine(
    address: str | None = None, workers: int | None = None, cpus: int | None = None
) -> Callable[[Painter, Sequence[Values]], Generator[Result, None, None]]:
    """Return the engine.

    Args:
        address: "auto" for the cluster that this machine belongs to, HOST:PORT of its head node, "local" for a cluster
            of this machine alone; None for $RAY_ADDRESS, else "local". Where the program is connected to Ray already,
            that connection is used.
        workers: The most actors; None for as many as the processors are enough for.
        cpus: Processors of each actor, and its threads; None for those of the smallest node, so one actor per node.

    Raises:
        UsageError: A number is impossible, the address is not one, or Ray is not installed.
    """
    for name, number in (("workers", workers), ("threads", cpus)):
        if number is not None and not 1 <= number <= MOST_THREADS:
            raise UsageError(f"{name} is {number}, but must be from 1 to {MOST_THREADS}")
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    _check_form(address)
    _ray()

    def run(painter: Painter, rows: Sequence[Values]) -> Generator[Result, None, None]:
        with _connected(address) as ray:
            pool = _pool(ray, painter, workers, cpus)
            yield from _passes(ray, pool, rows)

    return run


@dataclass(frozen=True)
class Pool:
    """Actors: how many, how many processors each, and what each runs."""

    size: int
    cpus: int
    painter: Painter


def _ray() -> Any:
    """Import Ray, which must neither count its users nor print what it does.

    Raises:
        UsageError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError('the engine ray needs a package: pip install "fluxonnx[ray]"') from None
    return ray


def _check_form(address: str) -> None:
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "/" in host:
        what = "ray:// addresses are not supported" if address.startswith("ray:") else "it is no address"
        raise UsageError(f"--address {address[:100]!r}: {what}: write {AUTO}, {LOCAL} or HOST:PORT of the head node")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to a cluster for the length of a `with` block.

    Raises:
        FluxonnxError: There is none.
    """
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    if address not in (LOCAL, AUTO):
        _check_answer(address)
    options = {"include_dashboard": False} if address == LOCAL else {}
    try:
        with _silent():
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except Exception as error:
        if address == LOCAL:
            raise FluxonnxError(f"Ray can't be started here: {_reason(error)}") from None
        where = "this machine belongs to no cluster of Ray" if address == AUTO else f"can't connect to Ray at {address}"
        why = "" if address == AUTO else f" ({_reason(error)})"
        raise FluxonnxError(f"{where}{why}: make it a node with ray start --address HOST:PORT") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what Ray's C++ part says about its own settings from standard error."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _check_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIME).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise FluxonnxError(
            f"can't connect to Ray at {address}: {reason}: start it there with ray start --head"
        ) from None


def _pool(ray: Any, painter: Painter, workers: int | None, cpus: int | None) -> Pool:
    """Divide the processors of a cluster, after a look at each node.

    Raises:
        FluxonnxError: No node has so many processors, or one lacks fluxonnx or the model.
    """
    nodes = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
    cpus, fits = share(nodes, cpus or painter.threads)
    _check_nodes(ray, painter, list(fits))
    size = min(sum(fits.values()), workers or MOST_THREADS * len(fits))
    return Pool(size, cpus, replace(painter, threads=cpus))


def share(nodes: Mapping[str, int], cpus: int | None) -> tuple[int, dict[str, int]]:
    """Divide the processors of nodes.

    Args:
        nodes: The processors of each.
        cpus: Those of a worker; None for all of the smallest node.

    Returns:
        The processors of a worker, and how many workers fit on each node on which one does.

    Raises:
        FluxonnxError: None fits.
    """
    found = [count for count in nodes.values() if count]
    if not found:
        raise FluxonnxError("no node of the cluster has processors for Ray: start them with --num-cpus above 0")
    cpus = cpus or min(found)
    fits = {node: count // cpus for node, count in nodes.items() if count >= cpus}
    if not fits:
        most = max(found)
        raise FluxonnxError(f"no node of the cluster has {cpus} processors: give workers at most --threads {most}")
    return cpus, fits


def _check_nodes(ray: Any, painter: Painter, nodes: Sequence[str]) -> None:
    """Look whether each node has what a worker needs: one that has not would be the fastest, and spoil most rows."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=1)(node_fault)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(painter, __version__)
        for node in nodes
    ]
    faults = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            fault = ray.get(answer)
        except ray.exceptions.RayError as error:
            fault = f"node {node[:8]}: {_reason(error)}"
        if fault:
            faults.append(fault)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise FluxonnxError(f"{faults[0]}{more}")


def node_fault(painter: Painter, version: str) -> str | None:
    """Return what the machine that this runs on lacks; None if nothing."""
    from fluxonnx import api
    from fluxonnx.contract import open_checkpoint

    host = worker_name().partition(":")[0]
    if version != __version__:
        return f"{host} has fluxonnx {__version__}, and the batch runs with {version}: install the same on all nodes"
    try:
        model = api.find_model(painter.model)
        open_checkpoint(model, painter.transformer, text_encoder=painter.text_encoder, vae=painter.vae)
    except (FluxonnxError, OSError) as error:
        return f"{host} lacks what the batch needs: {error}"
    return None


def _passes(ray: Any, pool: Pool, rows: Sequence[Values]) -> Iterator[Result]:
    """Yield the results of all rows; a row whose node went away may come twice."""
    left = {row["row"]: row for row in rows}
    for number in range(MOST_PASSES):
        try:
            for result in _pass(ray, pool, list(left.values())):
                left.pop(result["row"], None)
                yield result
        except ray.exceptions.RayError as error:
            if number + 1 == MOST_PASSES:
                raise FluxonnxError(f"Ray failed: {_reason(error)}; run the same command again for the rest") from None
        if not left:
            return


def _pass(ray: Any, pool: Pool, rows: Sequence[Values]) -> Iterator[Result]:
    import pyarrow

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = max(pool.size * BLOCKS_PER_WORKER, len(rows) // PROMPTS_AHEAD)
    size = max(1, -(-len(rows) // min(blocks, MOST_BLOCKS)))
    schema = _schema(pyarrow)
    tables = [pyarrow.Table.from_pylist([*rows[i : i + size]], schema) for i in range(0, len(rows), size)]
    painted = ray.data.from_arrow(tables).map_batches(
        Painter,
        fn_constructor_kwargs=asdict(pool.painter),
        batch_size=size,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool.size, initial_size=pool.size),
    )
    # Few blocks at a time are on their way here, so that this process needs no more memory for more pictures.
    for batch in painted.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from batch.to_pylist()


def _schema(pyarrow: Any) -> Any:
    """Return the Arrow types of the values of a row, which its columns have also where all of their cells are empty."""
    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(), str: pyarrow.string()}
    fields = []
    for name, field in ROW_KEYS.items():
        kind = pyarrow.uint64() if name == "seed" else kinds[str if field.kind is Path else field.kind]
        fields.append((name, pyarrow.list_(kind) if field.many else kind))
    return pyarrow.schema(fields)


def _reason(error: BaseException) -> str:
    """Return the last line of one of Ray's errors, which begin with a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
