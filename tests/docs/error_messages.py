"""The message of every refusal, stored in error_messages.json: make errors writes it, test_bad_inputs.py compares."""

import json
from pathlib import Path

from bad_inputs.registry import REFUSED, told
from bad_inputs.report import VERSIONS

RECORD = Path(__file__).with_suffix(".json")


def messages() -> dict[str, str]:
    """Return the message of each case, by its title."""
    found = {case.title: told(case) for case in REFUSED}
    return {title: f"{said.error.__name__}: {said.shown}" for title, said in sorted(found.items())}


def main() -> None:
    """Write the record."""
    record = {"versions": VERSIONS, "messages": messages()}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
