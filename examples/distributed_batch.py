# /// script
# requires-python = ">=3.9"
# dependencies = ["dask[distributed]"]
# ///
"""A batch on other processes or machines: `run_batch(executor=...)`.

    python examples/distributed_batch.py
    pip install "dask[distributed]"         # then it runs the Dask part, too

Threads, which `run_batch` uses by itself, do for most batches: a call is mostly waiting. Processes
help where large answers keep a processor busy, clusters where the work is there already. Any
`concurrent.futures.Executor` will do. With MPI (`pip install mpi4py`), a script that has these two
lines is started with `mpiexec -n 5 python -m mpi4py.futures your_script.py`:

    with mpi4py.futures.MPIPoolExecutor() as executor:
        batch = client.run_batch(calls, executor=executor)

The client travels to the workers, its credential with it, so use a cluster that you trust. The
workers must be able to import gateway_sdk and to reach the gateway.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where gateway_sdk.py is

import local_gateway

from gateway_sdk import GatewayClient, PrefabCall


def count_words(client: GatewayClient, executor: Executor, where: str) -> None:
    """Run a batch on an executor; the results come back in the order of the calls."""
    texts = ["word " * count for count in range(1, 21)]
    calls = [PrefabCall("text-tools", "1.1.0", "statistics", {"text": text}) for text in texts]
    batch = client.run_batch(calls, executor=executor)
    if not batch.all_success():
        sys.exit(f"{where}: {batch.get_failed()[0].error}")
    counts = [result.get_function_result()["words"] for result in batch.results]
    print(f"{where}: {batch.status}, words {counts}")
    if counts != list(range(1, 21)):
        sys.exit(f"{where}: the results are not those of the calls")


def use_processes(client: GatewayClient) -> None:
    # Not forked: other threads run here (the local gateway's), and a fork may catch their locks.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=spawn) as executor:
        count_words(client, executor, "process pool")


def use_dask(client: GatewayClient) -> None:
    try:
        import dask
        from dask.distributed import Client, LocalCluster
    except ImportError:
        print('Dask: not installed (pip install "dask[distributed]")')
        return
    # Dask takes tasks for free of side effects, which calls are not. With this setting, one that
    # is running when its worker dies is not sent again.
    dask.config.set({"distributed.scheduler.allowed-failures": 0})
    options = {"n_workers": 2, "threads_per_worker": 4, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster, Client(cluster) as dask_client:
        count_words(client, dask_client.get_executor(), "Dask")


if __name__ == "__main__":  # a spawned process imports this file: without this it would run it
    with local_gateway.environment(), GatewayClient.from_env() as client:
        use_processes(client)
        use_dask(client)
