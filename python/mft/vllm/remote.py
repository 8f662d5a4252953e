"""An HTTP client for a server with masks (python -m mft.vllm)."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_SECONDS = 600  # timeout of a request: a switch waits for the running answers


class Remote:
    """A server. address: such as http://127.0.0.1:8000. key: the server's --api-key, if it has one."""

    def __init__(self, address: str, key: str | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(
                f"llm must be an LLM, or a server's address such as http://127.0.0.1:8000, got {address!r}"
            )
        self.address, self.key = address.rstrip("/"), key

    def change(self, update: dict[str, Any]) -> dict[str, Any]:
        """Send a switch, or a step of flips. Raises: ValueError if the server refuses it; RuntimeError if it fails."""
        return self._ask("/v1/mft/use" if update.get("flips") is None else "/v1/mft/update", update)

    def tasks(self) -> dict[str, Any]:
        """Return the tasks that the server knows, and the task in use."""
        return self._ask("/v1/mft/tasks", None)

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = _message(error)
            raise (ValueError if error.code < 500 else RuntimeError)(said) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RuntimeError(f"{self.address} must answer, got {reason}: is python -m mft.vllm running?") from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.url} must be a server of python -m mft.vllm, got {error.code}: {text[:200]}"
