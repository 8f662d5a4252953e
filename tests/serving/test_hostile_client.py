"""The hostile client, with each kind of request twice, on a service in this process; it is also a command."""

from hostile_client import ANSWERED, CANCELLED, HALF_SENT, LENGTH, Address, Hostile, WellFormed, in_threads


def test_hostile_requests_change_no_answer_and_leave_nothing_behind(serve, until):
    running = serve(rows=8, waiting=64, length=LENGTH, hosts=frozenset(), connections=16)
    host, port = running.address.removeprefix("http://").split(":")
    address = Address(host, int(port))
    well_formed, hostile = WellFormed(address), Hostile(address)
    kinds = [*ANSWERED, *CANCELLED, *list(HALF_SENT) * 4] * 2
    threads = in_threads(4, range(len(kinds)), lambda number: hostile.send(kinds[number]))
    threads += in_threads(2, range(12), well_formed.ask)
    for each in threads:
        each.join(60)
    assert not any(each.is_alive() for each in threads)
    assert [*hostile.wrong, *well_formed.wrong] == []
    assert len(running.server.server_state.connections) <= 16
    hostile.close()
    until(lambda: running.scheduler.counts == (0, 0))
    until(lambda: not running.server.server_state.connections)
