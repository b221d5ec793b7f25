"""How ranks meet: by real threads and files; whoever waits in vain learns for whom."""

from __future__ import annotations

import threading

import pytest

from strop.slurm import attempts, rendezvous, stop


@pytest.fixture
def run(tmp_path):
    attempts.begin(tmp_path, job_id=None, restart_count=0, nodes=["n1"])
    return tmp_path


def test_four_ranks_meet(run):
    results = {}

    def rank(number: int) -> None:
        if number == 0:
            rendezvous.publish(run, 1, "10.0.0.1", 4321)
        results[number] = rendezvous.wait_for(run, 1, number, 4, 10)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (3, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), ("10.0.0.1", 4321))


def test_time_out_names_the_missing(run):
    rendezvous.publish(run, 1, "10.0.0.1", 4321)
    assert rendezvous.wait_for(run, 1, 2, 4, 1) == ("10.0.0.1", 4321)  # the others only need the address
    with pytest.raises(TimeoutError, match=r"2 rank\(s\) have not come: 1, 3"):
        rendezvous.wait_for(run, 1, 0, 4, 0.1)


def test_rank_0_has_no_address(run):
    with pytest.raises(TimeoutError, match=r"1 rank\(s\) have not come: 0"):
        rendezvous.wait_for(run, 1, 1, 2, 0.1)


@pytest.mark.parametrize(("failed", "waiting"), [(0, 1), (1, 0)])
def test_nobody_waits_for_a_rank_that_has_failed(run, failed, waiting):
    attempts.write_verdict(run, 1, failed, kind="user", exit_code=78, message="no such model", node="n7")
    with pytest.raises(rendezvous.PeerFailed, match=f"rank {failed} on n7 has failed: no such model"):
        rendezvous.wait_for(run, 1, waiting, 2, 30)


def test_a_stop_request_ends_the_waiting(run):
    request = stop.StopRequest(run, 1)
    stop.request(run, 1, "USR1")
    with pytest.raises(rendezvous.Stopped, match="file: USR1"):
        rendezvous.wait_for(run, 1, 1, 2, 30, request)
    assert request.poll() == "file: USR1"


def test_address_of_an_earlier_attempt_is_not_taken(run):
    rendezvous.publish(run, 1, "10.0.0.1", 4321)
    with pytest.raises(TimeoutError):
        rendezvous.wait_for(run, 2, 1, 2, 0.1)


def test_own_address():
    assert rendezvous.own_address("lo") == "127.0.0.1"
    with pytest.raises(OSError, match="STROP_IFNAME=nosuch0"):
        rendezvous.own_address("nosuch0")
    address = rendezvous.own_address()
    name = rendezvous.interface_of(address)
    assert name is not None
    assert (name == "lo") == address.startswith("127.")
