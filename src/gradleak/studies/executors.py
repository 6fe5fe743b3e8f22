"""Where cells are computed: in this process, in several, or on a Ray cluster. All yield cells as they finish, in any order.

Nobody but the caller writes results. A process that dies takes one cell with it: that cell is tried once more, then it has failed.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from gradleak.errors import BadInput, shortened
from gradleak.studies import revision
from gradleak.studies.study import Cell, Done, OnStep, OtherVersion, Task, failure, performed, without

Executor = Callable[[Sequence[Task]], Iterator[Done]]
ATTEMPTS = 2
DIED = "Its process died {} times, for lack of memory perhaps."


def here(tasks: Sequence[Task], on_step: OnStep | None = None) -> Iterator[Done]:
    """One after another, in this process."""
    for task in tasks:
        yield from performed(task, on_step)


def processes(tasks: Sequence[Task], workers: int) -> Iterator[Done]:
    """Side by side in processes of this machine, which end when this one does.

    Every other process takes tasks from the end: neighbours cost alike, and the longest should not all come last.
    """
    todo, deaths = list(tasks), Counter[str]()
    running: dict[Connection, tuple[Any, Task | None]] = {}
    try:
        while todo or any(task for _, task in running.values()):
            while todo and len(running) < workers:
                process, connection = started()
                running[connection] = process, None
            for number, (connection, (process, task)) in enumerate(running.items()):
                if task is None and todo:
                    taken = todo.pop(-(number % 2))
                    connection.send(taken)
                    running[connection] = process, taken
            for ready in wait([c for c, (_, task) in running.items() if task]):
                assert isinstance(ready, Connection)
                process, task = running[ready]
                assert task is not None
                try:
                    message = ready.recv()
                except (EOFError, ConnectionError):
                    del running[ready]
                    process.join()
                    todo.insert(0, task)
                    if given_up(task, deaths):
                        yield failure(first_left(task), DIED.format(ATTEMPTS))
                        todo[0] = without(task, task.left[0])
                    continue
                if isinstance(message, BadInput):
                    raise message
                running[ready] = process, None if message is None else without(task, message.id)
                if message is not None:
                    yield message
    finally:
        for connection, (process, _) in running.items():
            connection.close()
            process.terminate()
            process.join()


def given_up(task: Task, deaths: Counter[str]) -> bool:
    """Whether the cell that was running when a process died has been tried often enough."""
    if not task.left:
        return False
    deaths[task.left[0]] += 1
    return deaths[task.left[0]] == ATTEMPTS


def first_left(task: Task) -> Cell[Any]:
    """The cell that is computed next."""
    return next(cell for cell in task.cells if cell.id == task.left[0])


def started() -> tuple[Any, Connection]:
    """A new worker, and the connection to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def work(connection: Connection) -> None:
    """What a worker process does: tasks come in, finished cells go out, None after the last of a task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        while True:
            task = connection.recv()
            try:
                for done in performed_there(task):
                    connection.send(done)
                connection.send(None)
            except BadInput as error:
                connection.send(error)
    except (EOFError, ConnectionError):
        return


def end_with_parent() -> None:
    """Wait until the parent is gone, and go."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def set_threads(count: int) -> None:
    """CPU threads of torch in this process."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def on_ray(tasks: Sequence[Task], address: str | None = None, gpus: float = 0) -> Iterator[Done]:
    """Each task is one of Ray, with as many CPUs as it has threads, on the cluster at `address`, or on one that is started here.

    Cells come back one by one; through Ray's client (ray://host:port), which has no generators, a task at a time. What runs on a
    node that dies is run again elsewhere. Raises BadInput without Ray or without a cluster, OtherVersion for a worker with another
    gradleak.
    """
    ray, one_by_one = connected(address), address is None or not address.startswith("ray://")
    send_by_value(ray, tasks)
    remote = ray.remote(performed_there if one_by_one else whole_task)
    returns = {"num_returns": "streaming"} if one_by_one else {}
    running: dict[Any, Task] = {}
    todo, deaths = list(tasks), Counter[str]()
    try:
        while todo or running:
            most = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)  # enough to keep it busy, few enough to hold
            while todo and len(running) < most:
                needs = remote.options(num_cpus=todo[0].threads, num_gpus=gpus, max_retries=ATTEMPTS, **returns)
                running[needs.remote(todo[0])] = todo[0]
                del todo[0]
            for reference in ray.wait(list(running))[0]:
                try:
                    finished = [ray.get(next(reference))] if one_by_one else ray.get(reference)
                except StopIteration:
                    del running[reference]
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, BadInput):
                        raise error.cause from None
                    raise BadInput(
                        f"A worker of Ray cannot begin: {shortened(str(error).splitlines()[-1])}."
                    ) from error
                except ray.exceptions.RayError as error:  # its worker or its node is gone, Ray's own retries included
                    todo.append(running.pop(reference))
                    if given_up(todo[-1], deaths):
                        yield failure(first_left(todo[-1]), f"Ray lost it {ATTEMPTS} times: {type(error).__name__}.")
                        todo[-1] = without(todo[-1], todo[-1].left[0])
                else:
                    for done in finished:
                        running[reference] = without(running[reference], done.id)
                        yield done
                    if not one_by_one:
                        del running[reference]
    finally:
        for reference in running:
            ray.cancel(reference, force=not one_by_one)


def connected(address: str | None) -> Any:
    """The library, connected to the cluster at that address, or to one of this machine's CPUs."""
    try:
        import ray
    except ImportError as error:
        raise BadInput("Ray is not installed: pip install 'gradleak[ray]'.") from error
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        where: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"There is no Ray cluster at {address}: {shortened(str(error))}") from error
    return ray


def send_by_value(ray: Any, tasks: Sequence[Task]) -> None:
    """Let modules of somebody's own, such as a script's, travel with their tasks: workers have gradleak alone."""
    for name in {revision.named(task.cell)[0] for task in tasks}:
        if not revision.ours(name) and name != "__main__":
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])


def performed_there(task: Task) -> Iterator[Done]:
    """What another process does. Raises OtherVersion where its gradleak is not that of the study."""
    if (own := revision.whole()) != task.revision:
        raise OtherVersion(
            f"The worker {os.uname().nodename} has gradleak {own}, and the study {task.revision}: install the same."
        )
    set_threads(task.threads)
    yield from performed(task)


def whole_task(task: Task) -> list[Done]:
    """The same, at once."""
    return list(performed_there(task))
