"""An export goes to the model hub: all of it in one commit, but for the paths of this machine."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from common.cli import UserError

# A string of JSON that is a path out of the working folder, and the last name in it.
OUTSIDE = re.compile(r'"(?:/|~/|(?:[^"\\]|\\.)*?\.\./)(?:[^"\\]|\\.)*?((?:[^"/\\]|\\.)*)"')


def push(folder: Path, repository: str, sidecar_name: str) -> str:
    """Uploads to a repository, made if it is not there; the commit's address. UserError if that fails."""
    sidecar = OUTSIDE.sub(r'"\1"', (folder / sidecar_name).read_text(encoding="utf-8"))
    files = {file.name: file for file in sorted(folder.iterdir())} | {sidecar_name: sidecar.encode()}
    try:
        if not get_token():
            raise ValueError("no token: log in with `hf auth login`, or set HF_TOKEN")
        HfApi().create_repo(repository, exist_ok=True)
        operations = [CommitOperationAdd(*pair) for pair in files.items()]
        return HfApi().create_commit(repository, operations, commit_message="Upload an export").commit_url
    except Exception as error:  # httpx and hf_xet below the library have errors of their own
        reason = " ".join(str(error).split())
        raise UserError(f"--push_to_hub {repository}: {reason}; {folder} is complete and stays") from error
