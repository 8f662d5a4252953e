"""Who may send requests: keys from a file, compared in constant time and never logged."""

import http.client
import json
import os

import httpx
import pytest

from mft.serving.api.api_keys import ApiKeys
from mft.serving.key import Key
from mft.serving.launch import serve as serve_masks
from mft.serving.options import Options

KEYS = ("sk-first-0123456789", "sk-second-0123456789")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{KEYS[0]}\n\n  {KEYS[1]}  \r\n")
    path.chmod(0o600)
    return path


def warnings_of(path):
    found = []
    ApiKeys(path, found.append)
    return found


HEADERS = {"none": None, "another scheme": f"Basic {KEYS[0]}", "another key": f"Bearer {KEYS[0]}x"}
HEADERS |= {f"another key ({i})": header for i, header in enumerate(("Bearer ", "Bearer \xe9", f"Bearer x{KEYS[0]}"))}


def test_others_get_401_on_every_route_of_the_api_and_the_log_names_no_key(serve, path):
    running = serve(keys=ApiKeys(path, pytest.fail))
    for got, header in HEADERS.items():
        for route in ("/v1/models", "/v1/completions", "/v1/load_lora_adapter", "/v1", "/v1/nothing"):
            connection = http.client.HTTPConnection(running.address.removeprefix("http://"), timeout=20)
            connection.request("GET", route, headers={} if header is None else {"Authorization": header})
            response = connection.getresponse()
            error = json.loads(response.read())["error"]
            connection.close()
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert error["code"] == "invalid_api_key"
            assert error["message"] == (
                "Authorization must be Bearer and one of the server's keys (--api-keys-file), got "
                f"{got.partition(' (')[0]}"
            )
            assert running.lines[-1].endswith(f" GET {route} 401: {error['message']}")
    assert not any(key in line for key in KEYS for line in running.lines)
    for route in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert httpx.get(f"{running.address}{route}").status_code == 200


FAULTY = {
    "good-key\nsk-\xe9": "hold keys of printable ASCII characters, one per line, got others in line 2 of ",
    "secret-1\nsk-secret alice": "--api-keys-file must name a key by 1 to 32 letters, digits and . _ -, the first a ",
    f"{'secret-' * 5} alice": ", got another name in line 1 of ",
    "alice secret": "must hold keys of at least 8 characters behind their names, got 6 in line 1 of ",
    "alice secret-1 code,se$cret": "/ -, the first a letter or a digit, got another as task 2 in line 1 of ",
    "alice secret-1 code,": "got another as task 2 in line 1 of ",
    "alice secret-1\nalice secret-2": "--api-keys-file must name each key differently, got 'alice' in line 1 of ",
    "line-2 secret-1\nsecret-2": "--api-keys-file must name each key differently, got 'line-2' in line 1 of ",
    "alice secret-1\n#\nbob secret-1": "--api-keys-file must hold each key once, got one in line 1 of ",
}


def test_a_faulty_file_is_refused_by_line_and_the_keys_stay(path):
    keys = ApiKeys(path, pytest.fail)
    for text, message in FAULTY.items():
        path.write_text(text)
        for read in (keys.read_again, lambda: ApiKeys(path, pytest.fail)):
            with pytest.raises(ValueError, match="--api-keys-file") as error:
                read()
            assert message in str(error.value)
            assert "secret" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        keys.read_again()
    assert keys.find(KEYS[1]) == Key("line-4", None)
    assert len(keys) == 2


def test_a_line_names_a_key_and_its_tasks_and_one_without_a_name_is_called_by_its_number(path):
    path.write_text("sk-one\nsk-one\n\talice  sk-alice math,code\r\n# old\nbob sk-bob-1\nsk-one")
    (admins := path.with_name("admins")).write_text("#\nsk-admin\nroot sk-root-1")
    keys = ApiKeys(path, lambda _: None, admins)
    assert [keys.find(f"sk-{name}") for name in ("one", "alice", "bob-1", "admin", "root-1", "alic")] == [
        Key("line-1", None),
        Key("alice", frozenset(("math", "code"))),
        Key("bob", None),
        Key("admin-line-2", None, is_admin=True),
        Key("root", None, is_admin=True),
        None,
    ]


ADMINS = {
    "root sk-root-1 code": "--admin-keys-file must hold only names and keys, got 3 words in line 1 of ",
    "sk-new\nalice sk-root-1": "--admin-keys-file must name each key differently, got 'alice' in line 1 of ",
    "root sk-alice": "--admin-keys-file must hold each key once, got one in line 1 of ",
    "# none": "--admin-keys-file must hold at least one key, in a line of its own, got none in ",
}


def test_a_faulty_file_of_admins_changes_no_key_of_either_file(path):
    path.write_text("alice sk-alice")
    (admins := path.with_name("admins")).write_text("root sk-root-1")
    admins.chmod(0o600)
    keys = ApiKeys(path, pytest.fail, admins)
    path.write_text("alice sk-alice\nbob sk-bob-1")
    for text, message in ADMINS.items():
        admins.write_text(text)
        with pytest.raises(ValueError, match="--admin-keys-file must") as error:
            keys.read_again()
        assert message in str(error.value)
        assert not any(key in str(error.value) for key in ("sk-root", "sk-alice"))
    assert (keys.find("sk-bob-1"), keys.find("sk-root-1")) == (None, Key("root", None, is_admin=True))


def test_a_file_that_others_can_read_is_warned_of(path):
    assert warnings_of(path) == []
    os.chmod(path, 0o640)
    assert warnings_of(path) == []
    os.chmod(path, 0o644)
    assert warnings_of(path) == [
        f"--api-keys-file should be readable by its owner alone, got mode 644 for {path}: chmod 600 {path}"
    ]


def test_a_server_that_everyone_may_change_is_warned_of(tmp_path, path, capsys):
    for options in ({}, {"api_keys_file": path}):
        with pytest.raises(ValueError, match="--model must name the base"):
            serve_masks({}, options=Options(load_from=tmp_path, **options))
        who, missing = ("only keys of --admin-keys-file", "it") if options else ("every client", "--api-keys-file")
        found = f"warning --load-from lets {who} load and unload masks, got {tmp_path} without {missing}: give one"
        assert found in capsys.readouterr().out


def test_every_key_is_compared_whole(path, monkeypatch):
    """It does not matter how early a key differs, or which key it equals."""
    from mft.serving.api import api_keys as module

    compared, compare = [], module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or compare(a, b))
    keys = ApiKeys(path, pytest.fail)
    assert [bool(keys.find(key)) for key in (*KEYS, "", "x" * 9999)] == [True, True, False, False]
    assert compared == [32] * 8
