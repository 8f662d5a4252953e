"""Find masks in a directory, in masks/ of a run's directory, or in a Hub repository. Only the export is fetched.

A string that is no local path and looks like user/name, or user/name@revision, is looked up on the Hub. Its files go to
huggingface_hub's cache, and are checked as strictly as any other export.
"""

import os
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from mft.checks import nearest_path
from mft.files.hub import COMMIT, NotOnHub, hub_is_reachable, split_hub_id, translate_hub_errors, unreachable
from mft.masks.export_format import CONFIG_FILE, MASK_FILE, MOST_CONFIG, most_bytes, read_config

MASKS = "masks"  # in the directory of a run


def masks_directory(place: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the directory of an export: place, its masks/ if it is a run, or the local cache of a Hub repository.

    Args:
        place: as for local_directory; a pathlib.Path is never a repository.
        revision: for a repository: a branch, a tag, or a commit hash, which pins it.
    Raises: as local_directory. Whether the directory holds an export is left to the reader.
    """
    path = local_directory(place, revision)
    return path / MASKS if (path / MASKS).is_dir() else path


def local_directory(place: str | os.PathLike, revision: str | None = None) -> Path:
    """Return place itself, or the local cache of the Hub repository that it names.

    Raises: ValueError for a revision of a local directory, or if a file of the repository is larger than an export's
        can be; FileNotFoundError if there is neither such a directory nor such a repository; OSError if the Hub cannot
        be reached or the connection breaks.
    """
    named = split_hub_id(place) if isinstance(place, str) and not os.path.lexists(place) else None
    if named is None:
        if revision is not None:
            raise ValueError(
                f"revision must be None for masks on this machine, which have one state, got {revision!r} for "
                f"{str(place)!r}: leave it out, or name a repository of the hub"
            )
        return Path(place)
    repository, after_at = named
    if revision is not None and after_at is not None:
        raise ValueError(f"revision must be given once, got {revision!r} and {str(place)!r}: leave one out")
    try:
        return fetch_masks(repository, after_at if revision is None else revision)
    except NotOnHub as error:
        path = Path(place)
        raise NotOnHub(
            f"masks must be a directory or a repository of the hub, got {place!r}: there is no such directory here"
            f"{nearest_path(path)}, and {error}"
        ) from error


def fetch_masks(
    repository: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch the two files of an export, of one commit, to huggingface_hub's cache, unless they are there.

    Args: token, cache_dir, local_files_only: as for hf_hub_download. Raises: as local_directory.
    """
    cache = None if cache_dir is None else str(cache_dir)
    if COMMIT.fullmatch(revision or "") and (there := _cached_directory(repository, str(revision), cache)):
        return there
    api = HfApi(token=token)
    if local_files_only or not hub_is_reachable():
        reason = "local_files_only is True" if local_files_only else unreachable()
        return _find_offline(api, repository, revision, cache, reason)
    with translate_hub_errors(repository, revision):
        commit = api.resolve_revision(repository, revision=revision, cache_dir=cache).resolved
    if there := _cached_directory(repository, commit, cache):
        return there
    with translate_hub_errors(repository, revision):
        found = api.get_paths_info(repository, [CONFIG_FILE, MASK_FILE], revision=commit)
        sizes = {file.path: file.size for file in found if hasattr(file, "size")}
    _check_sizes(repository, sizes, {CONFIG_FILE: MOST_CONFIG, MASK_FILE: None})
    with translate_hub_errors(repository, revision):
        path = Path(hf_hub_download(repository, CONFIG_FILE, revision=commit, token=token, cache_dir=cache))
    export = read_config(path)  # before the mask file, which may be large, is fetched
    _check_sizes(repository, sizes, {MASK_FILE: most_bytes(export)})
    with translate_hub_errors(repository, revision):
        hf_hub_download(repository, MASK_FILE, revision=commit, token=token, cache_dir=cache)
    return path.parent


def _find_offline(api: HfApi, repository: str, revision: str | None, cache: str | None, reason: str) -> Path:
    """Return the cached export of a repository, for use when the Hub cannot be reached."""
    try:
        with translate_hub_errors(repository, revision):
            commit = api.resolve_revision(
                repository, revision=revision, cache_dir=cache, local_files_only=True
            ).resolved
        directory = _cached_directory(repository, commit, cache)
    except NotOnHub:
        directory = None
    if directory is None:
        at = "" if revision is None else f" at revision {revision!r}"
        raise NotOnHub(f"an export of {repository!r}{at} is not in the hub's local cache either; {reason}")
    return directory


def _cached_directory(repository: str, commit: str, cache: str | None) -> Path | None:
    files = (CONFIG_FILE, MASK_FILE)
    paths = [try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit) for name in files]
    return Path(str(paths[0])).parent if all(isinstance(path, str) for path in paths) else None


def _check_sizes(repository: str, sizes: dict[str, int], most: dict[str, int | None]) -> None:
    for name, bound in most.items():
        if name not in sizes:
            raise FileNotFoundError(
                f"the hub's {repository!r} must hold an export of masks, {CONFIG_FILE} and {MASK_FILE}, got no {name}: "
                "name another repository; a whole model is loaded with load_model"
            )
        if bound is not None and sizes[name] > bound:
            raise ValueError(
                f"the hub's {repository!r}: {name} must be of at most {bound} bytes, got {sizes[name]}: it is not "
                "fetched; what it holds besides masks is not for load_masks"
            )
