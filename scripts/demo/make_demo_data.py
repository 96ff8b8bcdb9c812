"""Writes the demo's data: pictures, captions, dialogues, texts and two tests, in English and Chinese.

    python scripts/demo/make_demo_data.py --out_dir out/demo/data
eval_unseen.jsonl is about pictures made of the held-out set's drawings, everything else of the other seven.
The same arguments give the same bytes; what is already there is not made again.
"""

import hashlib
import json
import os
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from demo_pictures import DEMO_DIR, Sprites, Thing, load_sprites, load_world, paint, random_scene

LANGUAGES = ("en", "zh")
LARGE_KINDS = ("this", "kindof", "either")
SMALL_KINDS = ("what", "where", "count", "which", "kind")
KINDS = LARGE_KINDS + SMALL_KINDS
SPLITS = ("images", "images_val", "images_seen", "images_unseen")  # folders, and streams of random numbers
VALIDATION_ROWS = 200
TEXTS_PER_PICTURE = 2
DIALOGUES_PER_PICTURE = 3  # new questions cost nothing, and keep it from learning answers by heart
PICTURES_PER_TASK = 1000


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write (replaced as a whole)")
    parser.add_argument("--pictures", type=int, default=20000, help="training pictures")
    parser.add_argument("--questions", type=int, default=1000, help="questions of each of the two tests")
    parser.add_argument("--seed", type=int, default=1337, help="of everything random")
    args = parser.parse_args()
    if args.pictures < 1 or args.questions < 1:
        parser.error("--pictures and --questions must be at least 1")

    manifest = {
        "pictures": args.pictures,
        "questions": args.questions,
        "seed": args.seed,
        "made_of": fingerprint(),
    }
    there = args.out_dir / "manifest.json"
    if there.is_file() and json.loads(there.read_text(encoding="utf-8")) == manifest:
        print(f"{args.out_dir}: already there")
        return
    if args.out_dir.exists() and not there.is_file() and any(args.out_dir.iterdir()):
        sys.exit(f"error: {args.out_dir} holds other files (no manifest.json); name an empty or a new folder")

    # Made under another name and renamed at the end, so that an interrupted run leaves nothing half done.
    partial = args.out_dir.with_name(args.out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_all(partial, args.pictures, args.questions, args.seed)
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(args.out_dir, ignore_errors=True)
    partial.rename(args.out_dir)
    print(f"{args.out_dir}: {args.pictures} training pictures, two tests of {args.questions} questions")


def write_all(out_dir: Path, pictures: int, questions: int, seed: int) -> None:
    speakers = [Speaker(load_world(), language) for language in LANGUAGES]
    counts = dict(zip(SPLITS, (pictures, VALIDATION_ROWS, questions, questions), strict=True))
    tasks = []
    for split, count in counts.items():
        (out_dir / split).mkdir()
        for start in range(0, count, PICTURES_PER_TASK):
            tasks.append((out_dir, split, range(start, min(start + PICTURES_PER_TASK, count)), seed))
    drawn: dict[str, list[tuple[str, list[Thing]]]] = {split: [] for split in SPLITS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(draw_pictures, *zip(*tasks, strict=True))
        for (_, split, _, _), part in zip(tasks, parts, strict=True):
            drawn[split] += part

    rng = np.random.default_rng([seed, 0, len(SPLITS) + 1])
    write_rows(out_dir / "lm.jsonl", texts(rng, speakers, pictures * TEXTS_PER_PICTURE))
    write_rows(out_dir / "pretrain.jsonl", [caption_row(rng, speakers, *item) for item in drawn["images"]])
    shown = [item for item in drawn["images"] for _ in range(DIALOGUES_PER_PICTURE)]
    write_rows(out_dir / "sft.jsonl", [dialogue_row(rng, speakers, *item) for item in shown])
    write_rows(out_dir / "val.jsonl", [dialogue_row(rng, speakers, *item) for item in drawn["images_val"]])
    for split, name in (("images_seen", "eval_seen.jsonl"), ("images_unseen", "eval_unseen.jsonl")):
        items = enumerate(drawn[split])
        write_rows(out_dir / name, [test_row(rng, speakers, index, *item) for index, item in items])


def draw_pictures(out_dir: Path, split: str, indices: range, seed: int) -> list[tuple[str, list[Thing]]]:
    """Saves these pictures of a split; returns their names below `out_dir` and what is in them."""
    sprites = load_sprites(held_out=split == "images_unseen")
    drawn = []
    for index in indices:
        # A stream of its own for each picture: the pictures do not depend on the number of processes.
        rng = np.random.default_rng([seed, index, 1 + SPLITS.index(split)])
        is_test = split in ("images_seen", "images_unseen")
        large = KINDS[index % len(KINDS)] in LARGE_KINDS if is_test else rng.random() < 0.5
        scene = random_scene(rng, sprites, large)
        name = f"{split}/{index:06d}.png"
        paint(rng, scene, sprites)[0].save(out_dir / name, compress_level=1)
        drawn.append((name, scene))
    return drawn


class Speaker:
    """Says in one language what is in a scene, in the words of world.json."""

    def __init__(self, world: dict, language: str):
        self.language = language
        self.names = {concept["en"]: concept[language] for concept in world["concepts"]}
        self.kinds = {
            concept["en"]: world["kinds"][concept["kind"]][language] for concept in world["concepts"]
        }
        self.positions = [position[language] for position in world["positions"]]
        self.numbers = [number[language] for number in world["numbers"]]
        self.prompts = world["caption"]["prompts"][language]
        self.questions = {
            kind: entry[language] for kind, entry in (world["big_questions"] | world["questions"]).items()
        }
        self.no_article = set(world["no_article"])

    def a_thing(self, name: str) -> str:
        if self.language == "zh" or name in self.no_article:
            return self.names[name]
        vowel = (name[0] in "aeiou" and name != "unicorn") or name == "hourglass"
        return f"{'an' if vowel else 'a'} {name}"

    def caption(self, scene: list[Thing]) -> str:
        if scene[0].cell is None:
            return self.a_thing(scene[0].name)
        if self.language == "zh":
            return "，".join(f"{self.positions[thing.cell]}有{self.names[thing.name]}" for thing in scene)
        parts = [f"{self.a_thing(thing.name)} {self.positions[thing.cell]}" for thing in scene]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

    def sentence(self, scene: list[Thing]) -> str:
        """The caption as the beginning of a text that goes on."""
        return self.caption(scene) + ("。" if self.language == "zh" else ". ")

    def ask(
        self, rng: np.random.Generator, kind: str, scene: list[Thing], thing: Thing | None = None
    ) -> tuple[str, str]:
        """A question of this kind about `thing`, or any of the scene's, and its answer."""
        thing = thing or scene[rng.integers(len(scene))]
        name = self.names[thing.name]
        words = {"thing": name}
        answer = name
        if thing.cell is not None:
            words["position"] = self.positions[thing.cell]
        if kind == "where":
            answer = words["position"]
        elif kind == "count":
            answer = self.numbers[len(scene) - 1]
        elif kind in ("kind", "kindof"):
            answer = self.kinds[thing.name]
        elif kind in ("either", "which"):
            pair = [thing.name, self.absent(rng, thing.name, scene)]
            rng.shuffle(pair)
            for key, choice in zip(("first", "second"), pair, strict=True):
                words |= {key: self.names[choice], f"a {key}": self.a_thing(choice)}
        phrasings = self.questions[kind]
        return phrasings[rng.integers(len(phrasings))].format(**words), answer

    def absent(self, rng: np.random.Generator, name: str, scene: list[Thing]) -> str:
        """A thing that is not in the scene, of the same kind as `name` 40 % of the time."""
        same = rng.random() < 0.4
        there = {thing.name for thing in scene}
        others = [o for o in self.names if o not in there and (self.kinds[o] == self.kinds[name]) == same]
        return others[rng.integers(len(others))]


def caption_row(rng: np.random.Generator, speakers: list[Speaker], image: str, scene: list[Thing]) -> dict:
    speaker = speakers[rng.integers(len(speakers))]
    return row([caption_turn(rng, speaker, scene)], image)


def caption_turn(rng: np.random.Generator, speaker: Speaker, scene: list[Thing]) -> tuple[str, str]:
    return speaker.prompts[rng.integers(len(speaker.prompts))], speaker.caption(scene)


def dialogue_row(rng: np.random.Generator, speakers: list[Speaker], image: str, scene: list[Thing]) -> dict:
    """A quarter of the time the caption; otherwise questions that each need a look at the picture."""
    speaker = speakers[rng.integers(len(speakers))]
    if rng.random() < 0.25:
        return row([caption_turn(rng, speaker, scene)], image)
    return row(looks(rng, speaker, scene), image)


def looks(rng: np.random.Generator, speaker: Speaker, scene: list[Thing]) -> list[tuple[str, str]]:
    """Questions whose answers no earlier turn gives away: those teach nothing about seeing."""
    if scene[0].cell is None:
        kinds = ["kindof"] * int(rng.random() < 0.5) + [rng.choice(["this", "either"])]
        return [speaker.ask(rng, kind, scene) for kind in kinds]
    turns = []
    for thing in rng.permutation(len(scene)):
        kind = rng.choice(["what", "where", "kind", "which"], p=[0.3, 0.3, 0.25, 0.15])
        turns.append(speaker.ask(rng, kind, scene, scene[thing]))
    if rng.random() < 0.5:
        turns.insert(int(rng.integers(len(turns) + 1)), speaker.ask(rng, "count", scene))
    return turns


def questions_about(
    rng: np.random.Generator, speaker: Speaker, scene: list[Thing], count: int
) -> list[tuple[str, str]]:
    """`count` different questions and their answers."""
    kinds = LARGE_KINDS if scene[0].cell is None else SMALL_KINDS
    turns: dict[str, str] = {}
    while len(turns) < count:
        question, answer = speaker.ask(rng, kinds[rng.integers(len(kinds))], scene)
        turns.setdefault(question, answer)
    return list(turns.items())


def test_row(
    rng: np.random.Generator, speakers: list[Speaker], index: int, image: str, scene: list[Thing]
) -> dict:
    """One question; the kinds and languages take turns."""
    kind = KINDS[index % len(KINDS)]
    speaker = speakers[index // len(KINDS) % len(speakers)]
    return row([speaker.ask(rng, kind, scene)], image) | {"kind": kind}


def texts(rng: np.random.Generator, speakers: list[Speaker], count: int) -> list[dict]:
    """Dialogues about described scenes: the words and questions are known before there is anything to see.

    Each thing is named and classified at least once in each language, however small `count` is.
    """
    words: Sprites = {name: {"": None} for name in speakers[0].names}  # scenes without drawings
    rows = []
    for speaker in speakers:
        for name in words:
            scene = [Thing(name, "", None, 0, 0, 0)]
            for kind in LARGE_KINDS:
                question, answer = speaker.ask(rng, kind, scene)
                rows.append(row([(speaker.sentence(scene) + question, answer)]))
    for _ in range(count - len(rows)):
        speaker = speakers[rng.integers(len(speakers))]
        scene = random_scene(rng, words, large=rng.random() < 0.25)
        turns = questions_about(rng, speaker, scene, int(rng.integers(1, 4)))
        if rng.random() < 0.15:
            turns.insert(int(rng.integers(len(turns) + 1)), caption_turn(rng, speaker, scene))
        turns[0] = (speaker.sentence(scene) + turns[0][0], turns[0][1])
        rows.append(row(turns))
    return [rows[index] for index in rng.permutation(len(rows))]


def row(turns: list[tuple[str, str]], image: str | None = None) -> dict:
    """A row of the training files; the image stands before the first question."""
    conversations = []
    for question, answer in turns:
        if image is not None and not conversations:
            question = f"<image>\n{question}"
        conversations.append({"role": "user", "content": question})
        conversations.append({"role": "assistant", "content": answer})
    return ({} if image is None else {"image": image}) | {"conversations": conversations}


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for entry in rows:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def fingerprint() -> str:
    """Of what the data are made of and by, so that a newer version makes them anew."""
    made_of = [DEMO_DIR / "world.json", DEMO_DIR / "sprites.parquet"]
    made_by = [Path(__file__).with_name("demo_pictures.py"), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in made_of + made_by)).hexdigest()[:16]


if __name__ == "__main__":
    main()
