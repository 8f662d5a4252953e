"""Push to the hub in one commit: the checked files and their card.

pushed = push_to_hub("runs/masks", "user/masks")
mft.load_masks(model, "user/masks", revision=pushed.revision)
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

from mft.checks import check_one_of, check_rule
from mft.config import CODINGS
from mft.files.hub import COMMIT, HubError, hub_is_reachable, split_hub_id, translate_hub_errors, unreachable
from mft.files.json_file import short
from mft.publishing.card import is_made, license_of, model_card, read_card
from mft.publishing.content_kinds import read_contents
from mft.publishing.contents import README, Contents
from mft.publishing.markdown import hub_base


@dataclass(frozen=True)
class Pushed:
    """A finished push. revision: the commit's hash. notes: lines about what was left out, kept or not known."""

    url: str
    revision: str
    notes: tuple[str, ...] = ()


def push_to_hub(
    directory: str | os.PathLike,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    license: str | None = None,
    base: str | None = None,
    coding: str | None = None,
    overwrite_card: bool = False,
) -> Pushed:
    """Upload masks, an adapter that PEFT saved or a model, with a model card, in one commit.

    The hub's token decides which repositories may be written. The repository is created if it does not exist. A
    README.md in directory is used instead of a generated card. A README.md on the hub that was written or edited by
    hand is kept. Files that are already on the hub are not uploaded again.

    Args:
        directory: what save_masks, PEFT's save_pretrained, save_model or mft merge wrote, or a finished run.
        repository: user/name.
        revision: a branch, created if it does not exist; by default main.
        private: create the repository as private. An existing repository must be private already.
        message: the commit's message.
        license: the card's license, as the hub spells it; by default that of the base's card, if that card is on this
            machine.
        base: the base's name on the hub, if directory names the base by a path.
        coding: how masks are stored on the hub, as for save_masks; by default as in directory.
        overwrite_card: replace a README.md on the hub, whoever wrote it.
    Returns: the address, the commit, and notes on what was left out, kept or not known.
    Raises: FileNotFoundError or ValueError if directory holds nothing complete to push, or an argument breaks its rule;
        OSError if the hub cannot be reached or refuses. Then nothing on the hub has changed, except that the repository
        and the branch may have been created.
    """
    named = split_hub_id(repository)
    check_rule(named is not None and named[1] is None, "repository", "be user/name", repr(repository))
    check_rule(revision is None or not COMMIT.fullmatch(revision), "revision", "be a branch, which grows", revision)
    check_rule(revision != "", "revision", "be a branch's name, or None", repr(revision))
    check_rule(message != "", "message", "be a single line, or None", repr(message))
    check_rule(base is None or hub_base(base) == base, "base", "be user/name on the hub", repr(base))
    if coding is not None:
        check_one_of("coding", coding, CODINGS)
    contents = read_contents(Path(directory))
    changed: dict[str, bytes] = {}
    if coding is not None:
        contents, changed = contents.use_coding(coding)
    if base is not None:
        contents, renamed = contents.use_base(base)
        changed |= renamed
    notes = _notes(contents)
    card = _card(contents, repository, license, notes)
    if not hub_is_reachable():
        raise HubError(f"repository {repository!r} cannot be pushed to: {unreachable()}")
    api, branch = HfApi(), revision or "main"
    with translate_hub_errors(repository, revision, writing=True):
        url, head, there = _open_branch(api, repository, branch, private=private)
    if others := contents.rivals & there:  # a model and an adapter would be loaded together
        raise ValueError(
            f"repository must be new or hold the same kind of thing, got {repository!r} with {min(others)} for "
            f"{contents.kind}: name another one"
        )
    added = {name: changed.get(name, str(contents.directory / name)) for name in contents.files}
    replaces = README not in there or overwrite_card
    if not replaces:
        with translate_hub_errors(repository, head):
            present = read_card(Path(hf_hub_download(repository, README, revision=head)))
        replaces = present == card or is_made(present)
    if replaces:
        added[README] = card.encode()
    else:
        notes.append(f"{README} of {repository} was written or edited by hand and stays; --overwrite-card replaces it")
    stale = {name for name in there if contents.replaces(name)} - added.keys()
    operations: list[Any] = [CommitOperationDelete(name) for name in sorted(stale)]
    operations += [CommitOperationAdd(name, content) for name, content in added.items()]
    try:
        with translate_hub_errors(repository, revision, writing=True):
            # upload_folder makes several commits if hf_xet is installed.
            commit = api.create_commit(
                repository,
                operations,
                commit_message=message or f"Push {contents.kind} with mft",
                revision=branch,
                parent_commit=head,
            )
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"license and {README} must be valid on the hub, got the answer: {said}") from error
    return Pushed(url, commit.oid, tuple(notes))


def _open_branch(api: HfApi, repository: str, branch: str, *, private: bool) -> tuple[str, str, set[str]]:
    """Create the repository and the branch if needed, and return (url, head, names of files) of the branch."""
    url = str(api.create_repo(repository, private=private or None, exist_ok=True))
    if private and not api.model_info(repository).private:
        raise ValueError(f"private must be False for a repository that is public, got {repository!r}: see its settings")
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    info = api.model_info(repository, revision=branch)
    assert info.sha is not None, "the hub says which commit a branch is"
    return url, info.sha, {file.rfilename for file in info.siblings or []}


def _notes(contents: Contents) -> list[str]:
    notes = [] if contents.note is None else [contents.note]
    if contents.left_out:
        notes.append(f"left out of {contents.directory}: {', '.join(contents.left_out[:9])}")
    name = contents.facts.base_model_name_or_path
    if hub_base(name) is None:
        found = "no base is named" if name is None else f"the base is named {short(name)}, which others do not have"
        notes.append(f"{found}: --base USER/NAME says what it is on the hub")
    return notes


def _card(contents: Contents, repository: str, license: str | None, notes: list[str]) -> str:
    path = contents.directory / README
    if path.is_file():
        own = read_card(path)
        if contents.form is not None and contents.form in own:
            notes.append(f"{path} is PEFT's template, not filled in: a generated card replaces it")
        elif not is_made(own):
            return own
    found = {"license": license} if license is not None else license_of(contents.facts.base_model_name_or_path)
    if not found:
        notes.append("the card names no license, because that of the base is unknown: name one with --license")
    return model_card(contents, repository, found)
