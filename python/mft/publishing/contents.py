"""What a directory has to publish, whatever its kind: files, what is known of them, and what the card says."""

import abc
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from mft.config import ModelConfig
from mft.files.json_file import read_object
from mft.masks.export_format import CONFIG_FILE, MOST_CONFIG
from mft.publishing.facts import Facts
from mft.publishing.markdown import LONGEST, base_in_a_sentence, block, without_directory

README = "README.md"
OF_THE_HUB = (README, ".gitattributes")  # the card has its own rules, and the hub writes the other


@dataclass(frozen=True)
class Contents(abc.ABC):
    """files: what is uploaded, by name. note: a warning."""

    kind: ClassVar[str]  # in messages
    relation: ClassVar[str] = "adapter"  # to the base, in the hub's words
    library: ClassVar[str] = "mft_kernels"
    rivals: ClassVar[frozenset[str]]  # files of another kind, which would be loaded together with it
    names_base: ClassVar[str] = CONFIG_FILE  # the file that names the base
    form: ClassVar[str | None] = None  # is in a README.md that a program wrote and nobody has filled in

    directory: Path
    files: tuple[str, ...]
    facts: Facts
    note: str | None = None

    @classmethod
    @abc.abstractmethod
    def read(cls, directory: Path) -> Self:
        """What directory holds, checked as mft verify would. Raises: FileNotFoundError or ValueError, naming a file."""

    @abc.abstractmethod
    def introduction(self) -> str:
        """The card's first sentences: what it is."""

    @abc.abstractmethod
    def loading(self, repository: str) -> list[str]:
        """The card's blocks that load it from a repository."""

    @property
    def tags(self) -> list[str] | None:
        return ["mask-fine-tuning", "mft", "peft"]

    @property
    def size(self) -> str | None:
        """What its masks take, in words."""
        return None

    @property
    def left_out(self) -> list[str]:
        """What of the directory is not uploaded."""
        return sorted({path.name for path in self.directory.iterdir()} - {*self.files, *OF_THE_HUB})

    def replaces(self, name: str) -> bool:
        """Whether a file of this name in the repository, which is not one of files, is of an older one of the kind."""
        return False

    def in_coding(self, coding: str) -> tuple["Contents", dict[str, bytes]]:
        """The same with its masks stored so, and the files that change. Raises: ValueError if it has no masks."""
        raise ValueError(f"coding must be None for {self.kind}, got {coding}")

    def with_base(self, base: str) -> tuple["Contents", dict[str, bytes]]:
        """The same with this name of its base, and the file that names it, if there is one."""
        facts = dataclasses.replace(self.facts, base_model_name_or_path=base)
        return dataclasses.replace(self, facts=facts), self._naming(base)

    def _naming(self, base: str) -> dict[str, bytes]:
        if self.names_base not in self.files:
            return {}
        values = read_object(self.directory / self.names_base, MOST_CONFIG) | {"base_model_name_or_path": base}
        return {self.names_base: f"{json.dumps(values, indent=2)}\n".encode()}

    def _on_base(self) -> str:
        base = self.facts.base_model_name_or_path
        return "" if base is None else f" on {base_in_a_sentence(base)}"

    def _through_peft(self, repository: str) -> str:
        lines = [
            "from peft import PeftModel",
            "",
            "import mft.masks.peft  # the method MFT",
            "",
            f"base, tokenizer = mft.load_model({self._base()})",
            f'model = PeftModel.from_pretrained(base, "{repository}")',
        ]
        return block("python", lines)

    def _base(self) -> str:
        """What load_model takes for the base, as it stands in a program."""
        facts, name = self.facts, self.facts.base_model_name_or_path
        config = None if facts.config is None or facts.config.model.name != name else facts.config.model
        given = {"revision": None if config is None else config.revision, "dtype": facts.dtype}
        beside = [f"{key}={json.dumps(v)}" for key, v in given.items() if v not in (None, getattr(ModelConfig(), key))]
        unknown = name is None or len(name) > LONGEST
        base = json.dumps("path/to/the/base" if unknown else without_directory(str(name)))
        return f"mft.ModelConfig({', '.join([base, *beside])})" if beside else base
