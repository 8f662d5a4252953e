"""Whether the model hub answers at all, found in seconds: its client alone retries for half a minute."""

import functools
import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants

TIMEOUT_SECONDS = 5


@functools.cache
def hub_is_reachable() -> bool:
    """One request to the endpoint that huggingface_hub is set to, through the usual proxies; once a process."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # somebody answered; let the client speak of certificates
    except OSError:
        return False
