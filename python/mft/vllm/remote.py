"""Change the masks of a server (python -m mft.vllm) over HTTP."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_SECONDS = 600  # timeout of a request: a switch waits for the running answers


def change_server(address: str, update: dict[str, Any], api_key: str | None = None) -> None:
    """Send a switch, or a step of flips, to a server's address, such as http://127.0.0.1:8000.

    Raises: ValueError if the server refuses it; RuntimeError if it fails.
    """
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"llm must be an LLM, or a server's address such as http://127.0.0.1:8000, got {address!r}")
    address = address.rstrip("/")
    route = "use" if update.get("flips") is None else "update"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{address}/v1/mft/{route}", json.dumps(update).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        raise (ValueError if error.code < 500 else RuntimeError)(_message(error)) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"{address} must answer, got {reason}: is python -m mft.vllm running?") from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.url} must be a server of python -m mft.vllm, got {error.code}: {text[:200]}"
