"""Processes that share a study's directory through NFS, as two clients of one server. `make nfs-test` runs these."""

import functools
import itertools
import time

import pytest
from joiners import at_once, facts, finish, start, told, until
from loopback_nfs import CLIENTS, served
from tiny_study import equal, new_ground

from mft.files.atomic import publish
from mft_study.shared.leases import FOLDER, Leases, Pace

PACE = Pace(beat=0.2, expiry=2.0, look=0.1)


@pytest.fixture(scope="module", params=["vers=4.2", "vers=4.2,actimeo=1", "vers=4.0"])
def shares(request, tmp_path_factory):
    with served(tmp_path_factory.mktemp("nfs") / "shares", request.param) as found:
        yield found


@pytest.fixture
def seen(shares, request):
    """Return one new folder as each of the two clients sees it."""
    name = request.node.name.partition("[")[0]
    (shares.seen_by("one") / name).mkdir()
    return [shares.seen_by(client) / name for client in CLIENTS]


def test_one_of_two_clients_takes_a_name(seen):
    with Leases(seen[0], pace=PACE) as one, Leases(seen[1], pace=PACE) as two:
        for name in map(str, range(20)):
            taken = at_once([functools.partial(leases.take, name) for leases in (one, two)])
            assert sorted(taken) == [False, True]
            (one, two)[taken.index(True)].release(name)
    assert not (seen[0] / FOLDER).exists()


def test_one_of_two_clients_publishes_a_result(seen):
    for number in range(20):
        paths = [folder / f"{number}.json" for folder in seen]
        wins = at_once([functools.partial(publish, path, str(path)) for path in paths])
        assert sorted(wins) == [False, True]
        assert [path.read_text() for path in paths] == [str(paths[wins.index(True)])] * 2
    assert len(list(seen[0].iterdir())) == 20


def test_a_holder_that_beats_is_not_taken_over_and_its_results_are_seen_by_others(seen):
    """NFS remembers for 30 to 60 s that a file or a folder was absent."""
    result = [folder / "units" / "full" / "1.json" for folder in seen]
    with Leases(seen[0], pace=PACE) as one, Leases(seen[1], pace=PACE) as two:
        assert one.take("unit")
        end = time.monotonic() + 3 * PACE.expiry
        while time.monotonic() < end:
            assert not two.take("unit")
            time.sleep(0.1)
        assert not any(path.exists() for path in (seen[1] / "units", result[1]))
        publish(result[0], "found")
        two.wait()
        assert list(seen[1].glob("units/*/*.json")) == [result[1]]
        assert not (seen[1] / "told").exists()
        publish(seen[0] / "told", "found")
        one.release("unit")
        until(lambda: two.take("unit"), "it is taken", 60)
        assert (seen[1] / "told").is_file()


def test_a_client_without_network_is_replaced_and_learns_it(seen, shares):
    with Leases(seen[0], pace=PACE) as one, Leases(seen[1], pace=PACE) as two:
        assert one.take("unit")
        shares.network("one", "down")
        try:
            until(lambda: two.take("unit"), "it is taken", 60)
            assert publish(seen[1] / "result", "two")
        finally:
            shares.network("one", "up")
        until(lambda: "unit" not in one._held, "it is given up", 120)
        assert not publish(seen[0] / "result", "one")
        assert (seen[0] / "result").read_text() == "two"


@pytest.mark.slow
def test_joiners_of_two_clients_find_what_one_process_finds(seen, tmp_path_factory):
    """One of five is killed, and the clocks of two are a minute ahead."""
    directory = [folder / "run" for folder in seen]
    with new_ground(tmp_path_factory) as ground:
        alone = facts(ground, ground / "alone")
        killed = start(ground, directory[0], stage="after a result", call=2, foreign=True)
        killed.join(180)
        assert killed.exitcode == -9
        others = itertools.product(directory, (0.0, 60.0))
        running = [start(ground, folder, foreign=True, skew=skew) for folder, skew in others]
        finish(ground, directory[1], running, 400)
        assert equal(facts(ground, directory[1]), alone)
    results = told(directory[1])
    assert len(results) == len(set(results))
    assert not (directory[0] / FOLDER).exists()
