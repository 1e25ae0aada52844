"""What tests and scripts do in a fork works in several threads."""

import os
import threading

import torch

from tests.support.forks import renew_thread_pool


def _sums_in_threads() -> bool:
    """Whether six threads that start at once can all compute."""
    failures: list[Exception] = []
    gate = threading.Barrier(6)

    def work() -> None:
        gate.wait()
        try:
            torch.ones(100_000).sum()  # large enough to ask for the pool
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not failures


def test_threads_of_a_fork_find_a_pool() -> None:
    torch.get_num_threads()  # as any larger operation does; without the renewal a fork fails in a quarter of all cases
    for _ in range(20):
        child = os.fork()
        if child == 0:
            renew_thread_pool()
            os._exit(not _sums_in_threads())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
