"""The host names that requests may use."""

from mft.serving.api.hosts import check_host, known_hosts
from mft.serving.refusal import Refused


def asked(hosts, name):
    """Return (status, message) of the refusal, or (200, None)."""
    headers = [] if name is None else [(b"host", name.encode())]
    try:
        check_host({"type": "http", "headers": headers}, hosts, ", or one that the page names")
    except Refused as refused:
        return refused.status, refused.message
    return 200, None


LOOPBACK = ["localhost", "localhost:8000", "LocalHost.:80", "app.localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:80"]
FOREIGN = [None, "", ":80", "evil.example", "localhost.evil.example", "evillocalhost", "10.0.0.5:8000", "0.0.0.0"]
FOREIGN += ["[::1", "[::1]evil", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "localhost:80:80", "::1", "a" * 99]


def test_a_service_on_loopback_answers_to_names_of_loopback_alone():
    hosts = known_hosts("127.0.0.1", "127.0.0.1", ())
    assert [name for name in LOOPBACK if asked(hosts, name)[0] != 200] == []
    assert [name for name in FOREIGN if asked(hosts, name)[0] != 403] == []
    assert asked(hosts, "evil.example:80")[1] == (
        "Host must be a name of this machine's loopback, such as localhost, or one that the page names, "
        "got 'evil.example:80' (str)"
    )


def test_other_names_are_those_that_the_user_allows():
    hosts = known_hosts("127.0.0.1", "my-machine", ("Masks.Example",))
    for name in (*LOOPBACK, "masks.example", "masks.example:443", "my-machine:8000"):
        assert asked(hosts, name)[0] == 200
    assert asked(hosts, "other.example")[0] == 403
    assert known_hosts("::1", "::1", ("*",)) is None


def test_a_service_for_others_answers_to_any_name_unless_some_are_named():
    assert known_hosts("0.0.0.0", "0.0.0.0", ()) is None
    assert asked(None, "evil.example")[0] == 200
    hosts = known_hosts("10.0.0.5", "10.0.0.5", ("masks.example",))
    assert [asked(hosts, name)[0] for name in ("masks.example", "10.0.0.5:8000", "evil.example")] == [200, 200, 403]
