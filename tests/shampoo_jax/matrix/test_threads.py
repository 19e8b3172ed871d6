"""Threads that share a stack, and OpenBLAS's own."""

import threading

import pytest

from shampoo_jax.matrix import threads


def team_of(cores):
    team = threads.Team()
    team.cores, team.free = cores, threading.Semaphore(cores)
    return team


def test_a_team_does_every_place_once_and_as_many_at_a_time_as_there_are_cores():
    team, inside, most, seen = team_of(2), [], [], []
    together = threading.Barrier(2, timeout=60)

    def work(place):
        inside.append(place)
        if place < 2:
            together.wait()  # passes only where two are at work at once
        most.append(len(inside))
        inside.remove(place)
        seen.append(place)

    team.run(7, lambda: work)
    assert sorted(seen) == list(range(7))
    assert max(most) <= 2


def test_callers_share_the_cores_of_one_team():
    team, begun, go = team_of(1), [], threading.Event()

    def work(place):
        begun.append(place)
        assert go.wait(60)

    callers = [threading.Thread(target=team.run, args=(3, lambda: work)) for _ in range(8)]
    for caller in callers:
        caller.start()
    callers[-1].join(0.1)  # time to begin, for those that should not
    assert begun == [0]
    go.set()
    for caller in callers:
        caller.join(60)
    assert sorted(begun) == sorted([0, 1, 2] * 8)


def test_a_caller_does_not_wait_for_threads_that_have_not_begun():
    team, seen, go = team_of(2), [], threading.Event()
    for _ in range(2):
        team.pool.submit(go.wait, 60)  # for another device
    caller = threading.Thread(target=team.run, args=(3, lambda: seen.append))
    caller.start()
    caller.join(30)
    assert not caller.is_alive()
    assert seen == [0, 1, 2]
    go.set()


def test_a_pool_that_takes_nothing_more_leaves_all_to_the_caller():
    team, seen = team_of(4), []
    team.pool.shutdown()
    team.run(3, lambda: seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("mine", [True, False])
def test_an_error_in_any_thread_is_raised_when_none_is_at_work(mine):
    team, ended = team_of(2), []
    here, together = threading.get_ident(), threading.Barrier(2, timeout=60)

    def work(place):
        together.wait()
        if (threading.get_ident() == here) is mine:
            raise MemoryError
        ended.append(place)

    with pytest.raises(MemoryError):
        team.run(2, lambda: work)
    assert len(ended) == 1


def test_openblas_has_its_threads_back_when_the_last_has_left():
    class Library:
        def scipy_openblas_get_num_threads(self):
            return self.threads

        def scipy_openblas_set_num_threads(self, count):
            self.threads = count

    library = Library()
    library.threads = 7
    limit = threads.OneThread(library)
    with limit:
        assert library.threads == 1
        with limit:
            assert library.threads == 1
        assert library.threads == 1
    assert library.threads == 7
