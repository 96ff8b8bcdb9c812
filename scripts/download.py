"""Fetch what is published: `python scripts/download.py encoder lm vlm dataset`, of release 3 or of 2.

Sizes and free space are checked first, then `huggingface_hub` fetches and retries. HF_ENDPOINT names a mirror
of the hub, HF_TOKEN a token for gated repositories. The next run skips files that are complete, and fetches
one that was half fetched when it was interrupted again from its beginning.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read on import; the hub's Xet transport goes past HF_ENDPOINT

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, constants, errors, hf_hub_download
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run_main, user_errors, write_stdout
from dataset.files import sha256_of, write_atomically

ARCHIVE = re.compile(r"\.(zip|tar|tar\.gz|tgz)$")
MARKER = ".extracted.json"
BUFFER_BYTES = 2**23  # of each request for a range
BATCH_ROWS = 5000  # of --max_rows in memory at a time; among them each picture is written once
readable = tqdm.format_sizeof  # without the unit: 3e15 is "3.00P"


class Release(NamedTuple):
    """Repositories, and the names of files in them; of names with "|" between, the first that is there."""

    encoder: str
    weights: str
    tokenizer: str
    tokenizer_dir: str
    lm: str
    vlm: str


RELEASES = {
    2: Release(
        encoder="openai/clip-vit-base-patch16",
        weights="jingyaogong/MiniMind2-V-PyTorch",
        tokenizer="jingyaogong/MiniMind2-V",
        tokenizer_dir="minimind2-tokenizer",
        lm="lm_512.pth | llm_512.pth",
        vlm="*_vlm_512*.pth",
    ),
    3: Release(
        encoder="jingyaogong/siglip2-base-p32-256-ve",
        weights="jingyaogong/minimind-3v-pytorch",
        tokenizer="jingyaogong/minimind-3v",
        tokenizer_dir="minimind3-tokenizer",
        lm="llm_768.pth | lm_768.pth",
        vlm="*_vlm_768*.pth",
    ),
}
DATASET = "jingyaogong/minimind-v_dataset"
ENCODER_NAMES = {"clip": 2, "siglip2": 3}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    names = "encoder: that of the release, or clip or siglip2; lm: base language model; vlm: trained VLMs"
    choices = ["encoder", *ENCODER_NAMES, "lm", "vlm", "dataset"]
    parser.add_argument("names", nargs="+", choices=choices, help=names)
    parser.add_argument(
        "--release", type=int, choices=[2, 3], default=3, help="3: minimind-3v, 2: MiniMind2-V"
    )
    parser.add_argument("--part", choices=["pretrain", "sft"], help="the data of one stage alone")
    rows = "only so many rows from the beginning of each Parquet file of data"
    parser.add_argument("--max_rows", type=int, help=rows)
    encoder_dir = "folder for the encoder; if not given: one of its name in model/vision_model"
    parser.add_argument("--vision_model_path", type=Path, help=encoder_dir)
    parser.add_argument("--out_dir", type=Path, default="out", help="folder for weights and their tokenizer")
    parser.add_argument("--data_dir", type=Path, default="dataset", help="folder for the data set")
    arguments = parser.parse_args()
    if problem := misuse(arguments):
        parser.error(problem)
    with user_errors(), hub_errors():
        items = {name: item(name, arguments) for name in dict.fromkeys(arguments.names)}
        needed = {name: next(items[name], []) for name in items}
        check_free_space([file for files in needed.values() for file in files])
        for name, files in needed.items():
            for file in files:
                if not file.target.exists():  # the library would replace it
                    hf_hub_download(**file.request)
            next(items[name], None)


def misuse(arguments: Namespace) -> str:
    """What is wrong with the arguments together, if anything."""
    names, release = arguments.names, arguments.release
    for name, its_release in ENCODER_NAMES.items():
        if name in names and {"lm", "vlm"} & {*names} and release != its_release:
            fitting = " ".join("encoder" if one == name else one for one in names)
            commands = f"download.py {fitting} --release {its_release}, or --release {release}"
            return f"{name} does not go with the models of release {release}: {commands}"
    if len({"encoder", *ENCODER_NAMES} & {*names}) > 1 and arguments.vision_model_path:
        return "--vision_model_path is one folder, but several encoders are named"
    if "dataset" not in names and (arguments.part or arguments.max_rows is not None):
        return "--part and --max_rows are for dataset"
    if arguments.max_rows is not None and arguments.max_rows < 1:
        return f"--max_rows must be above 0, found {arguments.max_rows}"
    return ""


def item(name: str, arguments: Namespace) -> Iterator[list["HubFile"]]:
    """The work that `name` asks for: it yields the files it needs, and goes on once they are there."""
    release = RELEASES[ENCODER_NAMES.get(name, arguments.release)]
    if name in ("lm", "vlm"):
        return weights(release, arguments.out_dir, getattr(release, name))
    if name == "dataset":
        return dataset(arguments.data_dir, arguments.part, arguments.release, arguments.max_rows)
    folder = Path("model/vision_model", release.encoder.split("/")[1])
    return encoder(release.encoder, arguments.vision_model_path or folder)


class HubFile(NamedTuple):
    """A file of a hub repository; `digest` is its sha256 if it is in LFS, and its git blob id if not."""

    request: dict[str, Any]  # what the library needs to fetch it
    target: Path
    size: int  # bytes
    digest: str


def encoder(repo_id: str, folder: Path) -> Iterator[list[HubFile]]:
    """Keeps the vision part of the published encoder."""
    needed = ["config.json", "preprocessor_config.json", "model.safetensors | pytorch_model.bin"]
    if all(any((folder / name).exists() for name in names.split(" | ")) for names in needed):
        write_stdout(f"{folder} is already complete, skipped\n")
        return
    whole = folder.with_name(f"{folder.name}.part")
    yield list_files(repo_id, whole, needed)

    from transformers import AutoConfig, AutoImageProcessor, AutoModel, logging

    logging.set_verbosity_error()  # the text tower's weights are unused, as intended
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(whole)
    config = getattr(config, "vision_config", None) or config
    vision = whole / "vision"
    AutoModel.from_pretrained(whole, config=config, dtype="auto").save_pretrained(vision)
    AutoImageProcessor.from_pretrained(whole, backend="pil").save_pretrained(vision)
    folder.mkdir(parents=True, exist_ok=True)
    for path in vision.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(whole)
    write_stdout(f"{folder} holds the vision part, the rest is removed\n")


def weights(release: Release, folder: Path, names: str) -> Iterator[list[HubFile]]:
    """Describes each file of published weights in a sidecar."""
    files = list_files(release.weights, folder, [names])
    needed, optional = ["tokenizer.json", "tokenizer_config.json"], "special_tokens_map.json chat_template.*"
    tokenizer = folder / release.tokenizer_dir
    yield files + list_files(release.tokenizer, tokenizer, needed, optional)

    for file in files:
        sidecar = describe(file.target, tokenizer, stage=re.split(r"_\d", file.target.name)[0])
        write_stdout(f"{file.target} is described by {sidecar}\n")


def describe(path: Path, tokenizer_path: Path, stage: str) -> Path:
    """Writes the sidecar of a bare published `.pth` beside it."""
    from common.tokenizer import load_tokenizer, tokenizer_fingerprint  # torch, which nothing above needs
    from common.weights import config_from_shapes, load_weights_file, write_json

    config = config_from_shapes(load_weights_file(path)[0], path)
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(tokenizer_path)))
    tokenizer = {"fingerprint": fingerprint, "path": str(tokenizer_path)}
    about = {"stage": stage, "step": None, "config": config, "tokenizer": tokenizer, "encoder": None}
    write_json(path.with_suffix(".json"), about)
    return path.with_suffix(".json")


def dataset(folder: Path, part: str | None, release: int, max_rows: int | None) -> Iterator[list[HubFile]]:
    """Parquet, or for release 2 JSONL and archives of pictures, which are unpacked; where there is only the
    other of these, that."""
    if max_rows is not None:
        for stage in [part] if part else ["pretrain", "sft"]:
            first_rows(f"{stage}_i2t.parquet", folder, max_rows)
        return
    old = " ".join(f"{part or ''}*{kind}" for kind in (".jsonl", ".zip", ".tar", ".tar.gz", ".tgz"))
    ways = [f"{part or ''}*_i2t.parquet", old]
    needed = " | ".join(ways if release == 3 else reversed(ways))
    files = list_files(DATASET, folder, [needed], repo_type="dataset")
    files = [file for file in files if not is_unpacked(file)]
    yield files
    for file in files:
        if ARCHIVE.search(file.target.name):
            unpack(file)


def first_rows(name: str, folder: Path, max_rows: int) -> None:
    """Writes a file of the first `max_rows` rows of a Parquet file of the data set, of which it reads no more
    row groups than have them."""
    target = folder / f"{Path(name).stem}-first-{max_rows}.parquet"
    if target.exists():
        write_stdout(f"{target} is already there, skipped\n")
        return
    try:
        # Each column's part of a row group is asked for by itself: nothing is read ahead.
        source = HfFileSystem().open(f"datasets/{DATASET}/{name}", cache_type="none")
    except FileNotFoundError:
        raise UserError(f"{DATASET} at {constants.ENDPOINT} has no {name}") from None
    try:
        parquet = pq.ParquetFile(source, buffer_size=BUFFER_BYTES)
        groups = enough_groups(parquet.metadata, max_rows)
        size = sum(parquet.metadata.row_group(i).total_byte_size for i in groups)
        check_free_space([HubFile({}, target, size, digest="")])  # at most so much

        def write(file: BinaryIO) -> None:
            left = max_rows
            settings = {"dictionary_pagesize_limit": 2**30, "compression": "zstd"}
            with (
                pq.ParquetWriter(file, parquet.schema_arrow, **settings) as writer,
                tqdm(total=max_rows) as bar,
            ):
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups):
                    rows = batch.slice(0, left)
                    writer.write_batch(rows)
                    left -= len(rows)
                    bar.update(len(rows))
                    if not left:
                        break

        write_atomically(target, write)
    except pa.ArrowException as error:
        raise UserError(f"{DATASET}/{name} at {constants.ENDPOINT} is no readable Parquet: {error}") from None
    write_stdout(f"{target} has the first rows: give it to --data_path\n")


def enough_groups(metadata: pq.FileMetaData, max_rows: int) -> list[int]:
    """The row groups that begin the file and have `max_rows` rows, or all."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [group for group, start in enumerate(starts) if start < max_rows]


def list_files(
    repo_id: str, folder: Path, needed: list[str], optional: str = "", repo_type: str = "model"
) -> list[HubFile]:
    """Files in the root of a repository. Each string of `needed` has patterns, with "|" between alternatives:
    the first of them that matches anything counts, and one must."""
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = HfApi().repo_info(repo_id, repo_type=repo_type, files_metadata=True, timeout=timeout)
    repository = {"repo_id": repo_id, "repo_type": repo_type, "revision": info.sha, "local_dir": folder}
    # Names with a folder are none of ours, which also keeps a hostile `../name` out.
    found = {file.rfilename: file for file in info.siblings if re.fullmatch(r"\w[^/\\:]*", file.rfilename)}
    files = []
    for patterns in [*needed, optional]:
        ways = [[n for one in way.split() for n in fnmatch.filter(found, one)] for way in patterns.split("|")]
        names = next(filter(None, ways), [])
        if patterns in needed and not names:
            wanted = " or ".join(patterns.replace("|", " ").split())
            raise UserError(f"{repo_id} at {constants.ENDPOINT} has no {wanted}")
        for name in names:
            size, lfs, blob_id = found[name].size, found[name].lfs, found[name].blob_id
            request = {**repository, "filename": name}
            file = HubFile(request, folder / name, size, lfs.sha256 if lfs else blob_id)
            if size is None or not file.digest:
                raise UserError(f"{constants.ENDPOINT} tells no size or no digest of {repo_id}/{name}")
            if file.target.exists() and not is_published(file):
                problem = f"{file.target} exists and differs from the published file ({readable(size)}B)"
                raise UserError(f"{problem}: move it away, or name another folder")
            files.append(file)
    return files


def is_published(file: HubFile) -> bool:
    """By content; the library's dry run goes by times and its own records, which fit other files too."""
    if len(file.digest) == 64:
        return sha256_of(file.target) == file.digest
    content = file.target.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.digest


def check_free_space(files: list[HubFile]) -> None:
    """Says what is to be fetched; UserError where that and what it holds does not fit on a disk."""
    needed, folders = Counter(), {}
    for file in files:
        is_here = file.target.exists()
        what = "already here" if is_here else "to download"
        write_stdout(f"{file.target}: {readable(file.size)}B {what}\n")
        # Pictures and the vision part are written while what holds them is still there.
        holds_more = ARCHIVE.search(file.target.name) or file.target.suffix in (".safetensors", ".bin")
        folder = next(parent for parent in file.target.absolute().parents if parent.exists())
        folders[folder.stat().st_dev] = folder
        needed[folder.stat().st_dev] += file.size * ((not is_here) + bool(holds_more))
    for disk, folder in folders.items():
        if needed[disk] > (free := shutil.disk_usage(folder).free):
            told = f"{readable(needed[disk])}B needed (download, and what is unpacked from it)"
            raise UserError(f"not enough space on the disk of {folder}: {told}, {readable(free)}B free")


def unpacked_folder(archive: HubFile) -> Path:
    return archive.target.with_name(ARCHIVE.sub("", archive.target.name))


def is_unpacked(archive: HubFile) -> bool:
    folder = unpacked_folder(archive)
    marker = folder / MARKER
    if marker.exists() and archive.digest in marker.read_text():
        state = "is up to date"
    elif folder.is_dir() and any(folder.iterdir()) and not marker.exists():
        state = "is there, though not extracted by this script"
    else:
        return False
    write_stdout(f"{folder} {state}, skipped\n")
    return True


def unpack(archive: HubFile) -> None:
    """Extracts an archive beside itself, all or nothing, then deletes it."""
    folder = unpacked_folder(archive)
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        extract(archive.target, temporary)
        # Archives hold either the folder itself or its contents.
        inside = temporary / folder.name
        source = inside if inside.is_dir() and len(list(temporary.iterdir())) == 1 else temporary
        (source / MARKER).write_text(json.dumps({"digest": archive.digest}) + "\n")
        if folder.is_dir() and any(folder.iterdir()):  # an older version, and perhaps files of the user's own
            before = folder.rename(folder.with_name(f"{folder.name}.before-{archive.digest[:8]}"))
            write_stdout(f"{before} is what {folder} was: delete it if nothing in it is yours\n")
        shutil.rmtree(folder, ignore_errors=True)
        source.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    archive.target.unlink()
    write_stdout(f"{archive.target} is extracted to {folder} and deleted\n")


def extract(archive: Path, folder: Path) -> None:
    """Extracts a zip or tar of plain files and folders; with anything else in it, nothing is written."""
    is_zip = archive.suffix == ".zip"
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            members = opened.infolist() if is_zip else opened.getmembers()
            needed, free = 0, shutil.disk_usage(archive.parent).free
            for member in members:
                if is_zip:  # the upper half of the attributes is the Unix mode, 0 where there is none
                    name, needed = member.filename, needed + member.file_size
                    is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                else:
                    name, needed = member.name, needed + member.size
                    is_plain = member.isfile() or member.isdir()
                path = PureWindowsPath(name)  # knows both kinds of slash, and drives
                if path.anchor or ".." in path.parts or not is_plain:
                    problem = "leaves the folder" if is_plain else "is a link or device"
                    raise ValueError(f"entry {name!r} {problem}")
            if needed > free:
                raise ValueError(f"it unpacks to {readable(needed)}B, but only {readable(free)}B are free")
            safely = {} if is_zip else {"filter": "data"}
            opened.extractall(folder, tqdm(members, f"extracting {archive.name}"), **safely)
    except Exception as error:  # either library, and zlib below them, has its own for what is broken
        raise UserError(f"{archive} cannot be extracted, and nothing was: {error}") from error


@contextlib.contextmanager
def hub_errors() -> Iterator[None]:
    """Turns a failed request into one line with the endpoint and what to do."""
    try:
        yield
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        # Where a request fails, the library looks for a local copy, and reports that there is none.
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        advice = "check the network, set HF_ENDPOINT to a mirror that has it, or HF_TOKEN if it is private"
        if isinstance(cause, errors.GatedRepoError):
            advice = "it is gated: accept its terms there, then set HF_TOKEN"
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"cannot fetch from {constants.ENDPOINT}: {reason}; {advice}") from error


if __name__ == "__main__":
    run_main(main)
