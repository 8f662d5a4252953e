"""The contents of a hub: repositories of commits; each commit has all files of a state, large ones by their SHA-256."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """large: stored as git LFS does, and named by its SHA-256."""

    content: bytes
    large: bool = False

    @property
    def blob(self) -> str:
        """Return git's name of the file, or of the pointer to a large one."""
        content = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.blob

    def described(self, path: str) -> dict:
        """Return the description that the routes tree and paths-info give."""
        described = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return described | ({"lfs": lfs} if self.large else {})


@dataclass
class Repository:
    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        """Make a commit with these files, the new head of the branch; return its SHA."""
        parts = [self.branches.get(branch, ""), str(len(self.commits)), *(f"{p}:{f.oid}" for p, f in files.items())]
        sha = hashlib.sha1("\0".join(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        """Return the SHA of a branch, or of a commit itself."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        sha = self.sha(revision)
        assert sha is not None
        return self.commits[sha]
