"""Forks of a process that uses torch."""

from __future__ import annotations

import torch


def renew_thread_pool() -> None:
    """Call it first in a fork, before any other thread of it.

    torch replaces the pool of a forked process at its first use, without a lock: of two threads that come first at
    once, such as those in which transformers loads weights, one may find none and fail with "Invalid thread pool!".
    torch renews it right after the fork itself only if the forking thread had never asked for the number of threads.
    """
    torch.set_num_threads(torch.get_num_threads())
