"""Names of repositories, and errors of the hub's client as messages with repository, rule and remedy."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from mft.files.hub import HubError, split_hub_id, translate_hub_errors


def test_a_name_is_an_owner_and_a_name_perhaps_with_a_revision():
    assert split_hub_id("user/masks") == ("user/masks", None)
    assert split_hub_id("user/masks@v1.0") == ("user/masks", "v1.0")
    assert split_hub_id("user/masks@refs/pr/1") == ("user/masks", "refs/pr/1")
    wrong = ["masks", "./masks", "../masks", "/user/masks", "a/b/c", "user/", "user/ma sks", "user/a--b", "user/m.git"]
    for text in (*wrong, "user/masks@", "~/m", ""):
        assert split_hub_id(text) is None, text


@pytest.mark.parametrize(
    "error",
    [
        OSError("Consistency check failed: file should be of size 10 but has size 9"),
        RuntimeError("Error while uploading"),
        OfflineModeIsEnabled("offline"),
    ],
)
def test_what_breaks_off_is_told_as_such(error):
    message = "connection to the hub for 'user/a' at revision 'v1' broke off"
    with pytest.raises(HubError, match=message), translate_hub_errors("user/a", "v1"):
        raise error


def test_an_error_of_the_disk_stays_one():
    with pytest.raises(OSError, match="No space left") as caught, translate_hub_errors("user/a"):
        raise OSError(28, "No space left on device")
    assert not isinstance(caught.value, HubError)


def test_what_the_client_wrapped_is_what_is_told():
    with pytest.raises(HubError, match="broke off .OfflineModeIsEnabled: down"), translate_hub_errors("user/a"):
        raise LocalEntryNotFoundError("not in the cache") from OfflineModeIsEnabled("down")
