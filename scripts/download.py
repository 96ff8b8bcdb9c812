"""Fetch the published encoder, weights and data set: `python scripts/download.py clip lm vlm dataset`.

Sizes and free space are checked before the first byte. `huggingface_hub` fetches every file (HF_ENDPOINT,
HF_TOKEN and its retries apply) into `<name>.<digest>.part`, which is checked against the hub's digest and
renamed; an interrupted run therefore resumes, and what is already there is skipped.
"""

import argparse
import fnmatch
import glob
import json
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError
from dataset.files import sha256_of

CLIP_REPO = "openai/clip-vit-base-patch16"
WEIGHTS_REPO = "jingyaogong/MiniMind2-V-PyTorch"
TOKENIZER_REPO = "jingyaogong/MiniMind2-V"
DATASET_REPO = "jingyaogong/minimind-v_dataset"

ARCHIVES = ["*.zip", "*.tar", "*.tar.gz", "*.tgz"]
MARKER = ".extracted.json"
RESUME_HINT = "what was downloaded is kept, the same command resumes"


def main(arguments: argparse.Namespace) -> None:
    items = [PLANS[name](arguments) for name in dict.fromkeys(arguments.names)]
    for item in items:
        print(item.summary(), flush=True)
    check_free_space(items)
    for item in items:
        for file in item.files:
            fetch(file)
        item.finish()


@dataclass(frozen=True)
class RemoteFile:
    """One file of a hub repository and where it goes; `digest` is its sha256 (LFS) or its git blob id."""

    repo_id: str
    repo_type: str
    commit: str
    name: str
    size: int
    digest: str
    target: Path
    unpacked_size: int = 0  # bytes needed on top of the download, while both are on disk

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.{self.digest[:12]}.part")

    @property
    def missing(self) -> int:
        """Bytes still to download."""
        if self.target.exists():
            return 0
        return self.size - (self.part.stat().st_size if self.part.exists() else 0)


@dataclass
class Item:
    name: str
    source: str
    target: Path
    files: list[RemoteFile] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    finish: Callable[[], None] = lambda: None

    def summary(self) -> str:
        missing = sum(file.missing for file in self.files)
        here = sum(file.size for file in self.files) - missing
        amount = readable(missing) if missing else "nothing"
        line = f"{self.name}: {self.source} -> {self.target}: {amount} to download"
        if here:
            line += f", {readable(here)} already here"
        return line + "".join(f", {note}" for note in self.skipped)


def plan_clip(arguments: argparse.Namespace) -> Item:
    folder = arguments.clip_dir
    item = Item("clip", CLIP_REPO, folder)
    weights = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    configs = [folder / "config.json", folder / "preprocessor_config.json"]
    if all(path.exists() for path in configs) and any(path.exists() for path in weights):
        item.skipped = ["already complete, skipped"]
        return item

    whole = folder.with_name(f"{folder.name}.part")
    files = list_files(CLIP_REPO, whole, [path.name for path in configs], [path.name for path in weights])
    found = {file.name: file for file in files}
    model = found.get("model.safetensors") or found.get("pytorch_model.bin")
    if model is None:
        raise ValueError(f"{CLIP_REPO} at {constants.ENDPOINT} has no weights")
    # The vision part is written beside the whole model, which is removed only then.
    item.files = [found[path.name] for path in configs] + [replace(model, unpacked_size=model.size)]
    item.finish = lambda: keep_vision_part(whole, folder, model)
    return item


def plan_lm(arguments: argparse.Namespace) -> Item:
    return plan_weights("lm", ["lm_512.pth", "llm_512.pth"], arguments.out_dir)


def plan_vlm(arguments: argparse.Namespace) -> Item:
    return plan_weights("vlm", ["*_vlm_512*.pth"], arguments.out_dir)


def plan_weights(name: str, patterns: list[str], out_dir: Path) -> Item:
    tokenizer_dir = out_dir / "minimind2-tokenizer"
    weights = list_files(WEIGHTS_REPO, out_dir, optional=patterns)
    if not weights:
        raise ValueError(f"{WEIGHTS_REPO} at {constants.ENDPOINT} has no {' or '.join(patterns)}")
    tokenizer = list_files(
        TOKENIZER_REPO,
        tokenizer_dir,
        ["tokenizer.json", "tokenizer_config.json"],
        optional=["special_tokens_map.json", "chat_template.*"],
    )

    def finish() -> None:
        from common.weights import describe_published_weights  # needs torch, which nothing above does

        for file in weights:
            sidecar = describe_published_weights(file.target, tokenizer_dir, file.name.split("_512")[0])
            print(f"{name}: {file.target} ({readable(file.size)}), described by {sidecar}", flush=True)

    return Item(
        name, f"{WEIGHTS_REPO}, tokenizer of {TOKENIZER_REPO}", out_dir, weights + tokenizer, finish=finish
    )


def plan_dataset(arguments: argparse.Namespace) -> Item:
    folder = arguments.data_dir
    item = Item("dataset", DATASET_REPO, folder)
    tables = list_files(DATASET_REPO, folder, optional=["*.jsonl", "*.parquet"], repo_type="dataset")
    archives = list_files(DATASET_REPO, folder, optional=ARCHIVES, repo_type="dataset")
    if not tables + archives:
        raise ValueError(f"{DATASET_REPO} at {constants.ENDPOINT} has no .jsonl, .parquet, .zip or .tar file")

    to_unpack = []
    for archive in archives:
        state = unpacked_state(archive)
        if state is None:
            to_unpack.append(replace(archive, unpacked_size=archive.size))
        else:
            item.skipped.append(f"{unpacked_folder(archive.target)} {state}, skipped")
    item.files = tables + to_unpack

    def finish() -> None:
        for archive in to_unpack:
            unpack(archive)

    item.finish = finish
    return item


PLANS = {"clip": plan_clip, "lm": plan_lm, "vlm": plan_vlm, "dataset": plan_dataset}


def list_files(
    repo_id: str,
    folder: Path,
    patterns: Sequence[str] = (),
    optional: Sequence[str] = (),
    repo_type: str = "model",
) -> list[RemoteFile]:
    """Files in the root of a repository, to go to `folder`; each of `patterns` must match at least one."""
    info = HfApi().repo_info(
        repo_id, repo_type=repo_type, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, files_metadata=True
    )
    files = []
    for sibling in info.siblings:
        name = sibling.rfilename
        # Names with a folder are none of ours, which also keeps a hostile `../name` out.
        if PureWindowsPath(name).name != name or not matches_any(name, [*patterns, *optional]):
            continue
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is None or not digest:
            raise ValueError(f"{constants.ENDPOINT} tells no size or no digest of {repo_id}/{name}")
        file = RemoteFile(repo_id, repo_type, info.sha, name, sibling.size, digest, folder / name)
        check_existing(file)
        files.append(file)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(file.name, pattern) for file in files):
            raise ValueError(f"{repo_id} at {constants.ENDPOINT} has no {pattern}")
    return files


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def check_existing(file: RemoteFile) -> None:
    """A file of that name that is not the published one is the user's own: never overwrite it."""
    if file.target.exists() and not matches_digest(file.target, file.digest):
        raise FileExistsError(
            f"{file.target} exists and differs from the published file ({readable(file.size)}): "
            "move it away, or name another folder"
        )


def check_free_space(items: list[Item]) -> None:
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for item in items:
        folder = existing_folder(item.target)
        device = folder.stat().st_dev
        folders[device] = folder
        needed[device] += sum(file.missing + file.unpacked_size for file in item.files)
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OSError(
                f"not enough space on the disk of {folder}: {readable(needed[device])} needed "
                f"(download, and what is unpacked from it), {readable(free)} free"
            )


def fetch(file: RemoteFile) -> None:
    """Download one file, going on where an earlier run stopped.

    `hf_hub_download` resumes only within a run: it deletes its partial file when that ends. Hence `http_get`.
    """
    if file.target.exists():
        return
    file.target.parent.mkdir(parents=True, exist_ok=True)
    for stale in file.target.parent.glob(f"{glob.escape(file.target.name)}.*.part"):
        if stale != file.part or stale.stat().st_size > file.size:
            stale.unlink()
    url = hf_hub_url(file.repo_id, file.name, repo_type=file.repo_type, revision=file.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # byte ranges of the file itself
    with file.part.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
        )
    if not matches_digest(file.part, file.digest):
        file.part.unlink()
        raise OSError(f"{url} arrived damaged (its digest is not {file.digest}): removed, please run again")
    file.part.replace(file.target)


def keep_vision_part(whole: Path, folder: Path, weights: RemoteFile) -> None:
    """Write the vision tower and preprocessor of the CLIP in `whole` to `folder`, and remove `whole`."""
    from transformers import AutoImageProcessor, CLIPVisionModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the text tower's weights are unused, as intended
    logging.disable_progress_bar()
    vision = whole / "vision"
    CLIPVisionModel.from_pretrained(whole, dtype="auto").save_pretrained(vision)
    AutoImageProcessor.from_pretrained(whole, backend="pil").save_pretrained(vision)
    folder.mkdir(parents=True, exist_ok=True)
    for path in vision.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(whole)
    kept = (folder / "model.safetensors").stat().st_size
    print(f"clip: kept the vision part in {folder}, {readable(kept)} of {readable(weights.size)}", flush=True)


def unpack(archive: RemoteFile) -> None:
    """Extract an archive beside itself, all or nothing, then delete it."""
    folder = unpacked_folder(archive.target)
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        extract(archive.target, temporary)
        # Archives hold either the folder itself or its contents.
        inside = temporary / folder.name
        source = inside if inside.is_dir() and len(list(temporary.iterdir())) == 1 else temporary
        marker = {"archive": archive.name, "size": archive.size, "digest": archive.digest}
        (source / MARKER).write_text(json.dumps(marker) + "\n")
        if folder.exists():
            shutil.rmtree(folder)  # empty, or an older version that carries our marker
        source.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    archive.target.unlink()
    print(f"dataset: extracted {archive.target} to {folder} and deleted the archive", flush=True)


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip or tar of plain files and folders; with anything else in it, nothing is written."""
    is_zip = archive.suffix == ".zip"
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            members = opened.infolist() if is_zip else opened.getmembers()
            total = 0
            for member in members:
                check_member(archive, member)
                total += member.file_size if is_zip else member.size
            free = shutil.disk_usage(archive.parent).free
            if total > free:
                raise OSError(f"{archive} unpacks to {readable(total)}, but only {readable(free)} are free")
            folder.mkdir()
            for member in tqdm(members, desc=f"extracting {archive.name}", unit="file"):
                if is_zip:
                    opened.extract(member, folder)
                else:
                    opened.extract(member, folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be extracted: {error}") from error


def check_member(archive: Path, member: zipfile.ZipInfo | tarfile.TarInfo) -> None:
    if isinstance(member, zipfile.ZipInfo):
        name = member.filename
        # The upper half of the attributes is the Unix mode, 0 where the archive was not made on Unix.
        plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
    else:
        name = member.name
        plain = member.isfile() or member.isdir()
    path = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if path.anchor or ".." in path.parts:
        problem = "leaves the folder"
    elif not plain:
        problem = "is a link or device"
    else:
        return
    raise ValueError(f"{archive}: entry {name!r} {problem}; nothing was extracted")


def unpacked_state(archive: RemoteFile) -> str | None:
    """Why the archive need not be unpacked, or None if it must be."""
    folder = unpacked_folder(archive.target)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    marker = folder / MARKER
    if not marker.exists():
        return "is there, though not extracted by this script"
    return "is up to date" if json.loads(marker.read_text())["digest"] == archive.digest else None


def unpacked_folder(archive: Path) -> Path:
    return archive.with_name(re.sub(r"\.(zip|tar|tar\.gz|tgz)$", "", archive.name))


def matches_digest(path: Path, digest: str) -> bool:
    if len(digest) == 64:
        return sha256_of(path) == digest
    return git_hash(path.read_bytes()) == digest


def existing_folder(path: Path) -> Path:
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def readable(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


def hub_error(error: httpx2.HTTPError) -> str:
    """One line about a failed request, with the endpoint and what to do."""
    if isinstance(error, GatedRepoError):
        return f"{error.response.url} is gated: accept its terms on {constants.ENDPOINT}, then set HF_TOKEN"
    if isinstance(error, HfHubHTTPError):
        return (
            f"{constants.ENDPOINT} answered {error.response.status_code} to {error.response.url}: set "
            f"HF_ENDPOINT to a mirror that has it, or HF_TOKEN if it is private; {RESUME_HINT}"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"cannot reach {constants.ENDPOINT} ({reason}): check the network, or set HF_ENDPOINT to a mirror; "
        f"{RESUME_HINT}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Download the published encoder, weights and data set.",
        epilog="HF_ENDPOINT names a mirror of the hub, HF_TOKEN a token for gated repositories.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=list(PLANS),
        help="clip: vision part of CLIP-ViT-B/16; lm: base LM; vlm: trained VLMs; dataset: both stages",
    )
    parser.add_argument(
        "--clip_dir",
        type=Path,
        default=Path("model/vision_model/clip-vit-base-patch16"),
        help="folder for the encoder",
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path("out"), help="folder for weights and their tokenizer"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("dataset"), help="folder for the data set")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        main(arguments)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {RESUME_HINT}", file=sys.stderr)
        sys.exit(130)
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        sys.exit(f"error: {hub_error(error)}")
    except (OSError, ValueError, UserError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
