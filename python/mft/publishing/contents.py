"""What a directory has to publish, for any kind of contents: the files, the facts about them, and the card's text."""

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
from mft.publishing.markdown import LONGEST, base_in_a_sentence, block, hide_directory

README = "README.md"
OF_THE_HUB = (README, ".gitattributes")  # README has rules of its own, and the hub writes .gitattributes


@dataclass(frozen=True)
class Contents(abc.ABC):
    """What a directory has to publish. files: the names of the files to upload. note: a warning."""

    kind: ClassVar[str]  # its name in messages
    relation: ClassVar[str] = "adapter"  # its relation to the base, in the hub's words
    library: ClassVar[str] = "mft_kernels"
    rivals: ClassVar[frozenset[str]]  # files of another kind, which would be loaded together with these
    names_base: ClassVar[str] = CONFIG_FILE  # the file that names the base
    form: ClassVar[str | None] = None  # text that marks a README.md which a program wrote and nobody has filled in

    directory: Path
    files: tuple[str, ...]
    facts: Facts
    note: str | None = None

    @classmethod
    @abc.abstractmethod
    def read(cls, directory: Path) -> Self:
        """Read and check the contents of directory, like mft verify. Raises: FileNotFoundError or ValueError."""

    @abc.abstractmethod
    def introduction(self) -> str:
        """Return the card's first sentences, which say what this is."""

    @abc.abstractmethod
    def loading(self, repository: str) -> list[str]:
        """Return the card's blocks that show how to load this from a repository."""

    @property
    def tags(self) -> list[str] | None:
        return ["mask-fine-tuning", "mft", "peft"]

    @property
    def size(self) -> str | None:
        """The size of the masks, in words."""
        return None

    @property
    def left_out(self) -> list[str]:
        """The names in the directory that are not uploaded."""
        return sorted({path.name for path in self.directory.iterdir()} - {*self.files, *OF_THE_HUB})

    def replaces(self, name: str) -> bool:
        """Return whether a file of this name in the repository, not in files, is from an older upload of this kind."""
        return False

    def use_coding(self, coding: str) -> tuple["Contents", dict[str, bytes]]:
        """Return the contents with masks in this coding, and the changed files. Raises: ValueError without masks."""
        raise ValueError(f"coding must be None for {self.kind}, got {coding}")

    def use_base(self, base: str) -> tuple["Contents", dict[str, bytes]]:
        """Return the contents with this name for the base, and the changed file that names it, if there is one."""
        facts = dataclasses.replace(self.facts, base_model_name_or_path=base)
        return dataclasses.replace(self, facts=facts), self._base_name_files(base)

    def _base_name_files(self, base: str) -> dict[str, bytes]:
        if self.names_base not in self.files:
            return {}
        values = read_object(self.directory / self.names_base, MOST_CONFIG) | {"base_model_name_or_path": base}
        return {self.names_base: f"{json.dumps(values, indent=2)}\n".encode()}

    def _base_phrase(self) -> str:
        base = self.facts.base_model_name_or_path
        return "" if base is None else f" on {base_in_a_sentence(base)}"

    def _peft_example(self, repository: str) -> str:
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
        """Return load_model's argument for the base, as Python code."""
        facts, name = self.facts, self.facts.base_model_name_or_path
        config = None if facts.config is None or facts.config.model.name != name else facts.config.model
        given = {"revision": None if config is None else config.revision, "dtype": facts.dtype}
        beside = [f"{key}={json.dumps(v)}" for key, v in given.items() if v not in (None, getattr(ModelConfig(), key))]
        unknown = name is None or len(name) > LONGEST
        base = json.dumps("path/to/the/base" if unknown else hide_directory(str(name)))
        return f"mft.ModelConfig({', '.join([base, *beside])})" if beside else base
