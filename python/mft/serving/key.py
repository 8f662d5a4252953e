"""What the client who sent a request may do, by its API key."""

from dataclasses import dataclass

from mft.serving.refusal import Refused


@dataclass(frozen=True)
class Key:
    """A client's rights. name: for the log and the metrics. tasks: None for all of them and the base."""

    name: str = ""
    tasks: frozenset[str] | None = frozenset()
    is_admin: bool = False

    @property
    def mark(self) -> str:
        """The name in a line of the log."""
        return f" ({self.name})" if self.name else ""

    def knows(self, model: str) -> bool:
        return self.tasks is None or model in self.tasks

    def check_model(self, model: str) -> None:
        """Raise Refused (403) unless the key may call a task, or the base by its name. The task need not exist."""
        if not self.knows(model):
            raise Refused(
                f"model must be one of the tasks of the key {self.name!r} (GET /v1/models), got {model[:200]!r}: ask "
                "for one of these, or let the operator add it to the key's line in --api-keys-file",
                status=403,
                param="model",
                code="model_not_allowed",
            )

    def check_admin(self) -> None:
        """Raise Refused (403) unless the key may load and unload masks."""
        if not self.is_admin:
            raise Refused(
                f"loading and unloading must be asked for with a key of --admin-keys-file, got {self.name!r} of "
                "--api-keys-file: send an admin's key; if there is none, start the server with --admin-keys-file FILE",
                status=403,
                code="not_an_admin",
            )


NOTHING = Key()  # until a request's key is known
EVERYTHING = Key(tasks=None, is_admin=True)  # for all clients of a server without keys
