"""Upload an exported folder to the Hugging Face hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmdistill.files import file_hash
from fmdistill.predict import artefact
from fmdistill.registry import UserError

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")  # huggingface_hub allows more, the hub does not


def run(folder: str | Path, repo: str, dry_run: bool = False, private: bool = False, api: Any = None) -> list[str]:
    """Upload `folder` to the model repository `repo` ("owner/name"), in one commit; return a line for each file.

    The checksums of all files are compared first. The repository is created if it does not exist, private if
    `private`. With `dry_run` nothing is sent, and neither network nor token is needed. `api` replaces
    huggingface_hub's HfApi. Raises UserError if the folder is no intact export, or the upload failed.
    """
    folder = Path(folder).expanduser()
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise UserError(f"{repo}: is no name of a repository; expected OWNER/NAME, such as me/sam-tinyvit")
    paths = _checked(folder)
    lines = [f"{path.stat().st_size:>13,}  {path.relative_to(folder).as_posix()}" for path in paths]
    if not dry_run:
        _upload(folder, repo, private, paths, _client() if api is None else api)
    total = sum(path.stat().st_size for path in paths)
    place = f"https://huggingface.co/{repo}"
    return [*lines, f"{total:>13,}  bytes {'would go' if dry_run else 'went'} to {place}{' (private)' * private}"]


def _checked(folder: Path) -> list[Path]:
    """Return the folder's files. Raises UserError unless they are exactly those that its JSON names."""
    exported = artefact.read(folder)
    paths = [exported.path(name) for name in sorted(exported.files)]
    present = {path.relative_to(folder).as_posix() for path in _present(folder)}
    unknown = sorted(present - exported.files.keys() - {artefact.NAME})
    if unknown:
        raise UserError(
            f"{folder / unknown[0]}: is not of the export ({len(unknown)} such); move it away, or export the run again"
        )
    return [folder / artefact.NAME, *paths]


def _present(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _client() -> Any:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            "push: no token of Hugging Face; run `hf auth login`, or set HF_TOKEN to a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    return HfApi()


def _upload(folder: Path, repo: str, private: bool, paths: list[Path], api: Any) -> None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    names = [path.relative_to(folder).as_posix() for path in paths]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
            commit_message=f"Export of fmdistill, {file_hash(folder / artefact.NAME)[:12]}",
        )
    except HFValidationError as error:
        raise UserError(f"{repo}: is no name of a repository ({_first(error)}); expected OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is sent; unset it, or add dry_run=true") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        way = {
            401: "the token is not valid; run `hf auth login` again",
            403: "the token may not write there; use one with write access, and a repository of your own",
        }.get(status, "try again later; what arrived is not sent twice")
        raise UserError(f"{repo}: Hugging Face refused the upload ({_first(error)}); {way}") from error
    except Exception as error:  # the client raises classes of whichever transport it was built on
        if not _of_network(error):
            raise
        raise UserError(
            f"{repo}: huggingface.co cannot be reached ({type(error).__name__}); add dry_run=true to see what would go"
        ) from error


def _of_network(error: BaseException) -> bool:
    """Return whether the error is of the connection: of httpx (or httpx2), of requests, or the operating system's."""
    transports = ("httpx", "httpcore", "requests", "urllib3")
    return isinstance(error, ConnectionError) or any(
        kind.__module__.startswith(transports) for kind in type(error).__mro__
    )


def _first(error: Exception) -> str:
    return next(iter(" ".join(str(error).split()).split(". ")), type(error).__name__)
