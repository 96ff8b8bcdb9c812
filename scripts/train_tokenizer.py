"""Train the byte-level BPE tokenizer: from word frequencies (the shipped one), or from your own text files.

Needs only `tokenizers`, plus `wordfreq` (3.1.1, build time only) where no --files are given. The same input,
seed and library versions give the same tokenizer.json, byte for byte.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run_main, user_errors

TOKENIZER_DIR = Path(__file__).resolve().parents[1] / "model" / "tokenizer"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2

# A newline and an "@" always stand alone: a turn is then tokenized the same whatever stands before it, and an
# image's run of placeholders keeps its length next to any text.
ALONE = r"[@\n]"
WORDS = (
    r"['’](?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])"
    r"| ?[\p{L}\p{M}]+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)

# How many words of each language are drawn: their ratio shares the merges out between the languages.
ENGLISH_WORDS, CHINESE_WORDS = 2_000_000, 2_100_000
# English frequencies are raised to this power: everyday text has fewer rare names than the lists count.
ENGLISH_SHARPNESS = 1.1
# The lists are in lower case. These are the commonest words that are not (without "may" and "march").
CAPITALIZED = frozenset(
    "monday tuesday wednesday thursday friday saturday sunday january february april june july august"
    " september october november december english england chinese china american america".split()
)

# What pictures are described with is rarer in the lists, which count news and talk, than in captions.
# So this share of the words is drawn from here, each as often as the others.
PICTURE_SHARE = 0.02
ENGLISH_PICTURE_WORDS = """
red blue green yellow orange purple pink brown black white gray color bright dark large small round left
right top bottom center front behind picture photo man woman boy girl child people person cat dog horse
bird fish sheep cow elephant bear rabbit monkey tiger lion duck chicken butterfly animal apple banana
strawberry lemon grapes fruit bread cake pizza rice cheese egg tomato carrot vegetable coffee bottle cup
glass plate bowl knife spoon chair table bed sofa lamp clock book umbrella hat shirt shoe dress glasses
bag ball guitar camera phone computer car bus train truck bicycle motorcycle airplane boat street road
bridge house building window door tree flower grass leaf mountain river beach sea sky sun moon star
cloud rain snow fire standing sitting running holding wearing looking
""".split()
CHINESE_PICTURE_WORDS = """
红色 蓝色 绿色 黄色 橙色 紫色 粉色 棕色 黑色 白色 灰色 颜色 左边 右边 上面 下面 中间 前面 后面 旁边 角落
图片 照片 男人 女人 男孩 女孩 孩子 一个人 小猫 小狗 马 小鸟 鱼 羊 牛 大象 熊 兔子 猴子 老虎 狮子 鸭子 鸡
蝴蝶 动物 苹果 香蕉 草莓 柠檬 葡萄 水果 面包 蛋糕 米饭 奶酪 鸡蛋 番茄 胡萝卜 蔬菜 咖啡 瓶子 杯子 玻璃
盘子 碗 刀 勺子 椅子 桌子 床 沙发 台灯 时钟 书 雨伞 帽子 衬衫 鞋子 裙子 眼镜 书包 球 吉他 相机 手机 电脑
汽车 公交车 火车 卡车 自行车 摩托车 飞机 船 街道 马路 大桥 房子 建筑 窗户 门 树 花 草地 树叶 高山 河流
海滩 大海 天空 太阳 月亮 星星 白云 下雨 雪 火 站着 坐着 奔跑 拿着 穿着 看着
""".split()


def main() -> None:
    args = parse_args()
    with user_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        texts = lines_of(args.files) if args.files else wordfreq_texts(args.seed)
        tokenizer = train(texts, args.vocab_size)
        save(tokenizer, args.out)
    learned = tokenizer.get_vocab_size()
    print(f"{learned} tokens written to {args.out}")
    if learned < args.vocab_size:
        print(f"warning: the text was too short for {args.vocab_size} tokens", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--files", type=Path, nargs="+", help="UTF-8 texts; without any, word frequencies")
    parser.add_argument("--out", type=Path, default=TOKENIZER_DIR, help="folder for the tokenizer's files")
    parser.add_argument("--vocab_size", type=int, default=6400, help="ids, special tokens and bytes included")
    parser.add_argument("--seed", type=int, default=1337, help="of the words drawn by frequency")
    args = parser.parse_args()
    smallest = len(SPECIAL_TOKENS) + 256
    if args.vocab_size < smallest:
        parser.error(
            f"--vocab_size is {args.vocab_size}: expected at least {smallest} (special tokens and bytes)"
        )
    return args


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The trained tokenizer; its ids are the special tokens, the bytes in byte-level order, the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ALONE), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, its transformers config and a copy of the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, start, end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end_of_text,
        "unk_token": end_of_text,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template = TOKENIZER_DIR / "chat_template.jinja"
    if folder.resolve() != TOKENIZER_DIR:
        shutil.copyfile(template, folder / template.name)


def lines_of(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def wordfreq_texts(seed: int) -> Iterator[str]:
    """Bilingual text with the words, spaces and punctuation of real text in their shares, but no meaning."""
    try:
        from wordfreq import get_frequency_dict
    except ImportError:
        raise UserError(
            "the package wordfreq is not installed: run `pip install wordfreq==3.1.1` (for this script), "
            "or give text of your own with --files"
        ) from None
    rng = random.Random(seed)
    # The roles stand in every prompt, so they are worth a token each.
    yield from ["system\nYou are a helpful assistant\nuser\nassistant\n"] * 2000
    yield from chinese_texts(get_frequency_dict("zh", "large"), rng)
    yield from english_texts(get_frequency_dict("en", "large"), rng)


def chinese_texts(frequencies: dict[str, float], rng: random.Random) -> Iterator[str]:
    """Clauses without spaces, so that pairs across words are learnt as well."""
    words = {w: f for w, f in frequencies.items() if re.fullmatch(r"[\u4e00-\u9fff]+", w)}
    draw = sampler(words, CHINESE_PICTURE_WORDS, rng)
    for length in lengths(CHINESE_WORDS, 3, 10, rng):
        clause = draw(length)
        if rng.random() < 0.1:
            clause[rng.randrange(length)] = number(rng)
        yield "".join(clause) + rng.choice("，，，，。。。、、！？；：（）“”《》…")


def english_texts(frequencies: dict[str, float], rng: random.Random) -> Iterator[str]:
    """Sentences; most follow another on the same line, the others begin one."""
    words = {
        w: f**ENGLISH_SHARPNESS for w, f in frequencies.items() if re.fullmatch(r"[a-z]+(['’][a-z]+)?", w)
    }
    draw = sampler(words, ENGLISH_PICTURE_WORDS, rng)
    # Sentences begin with common words (The, It, I) more often than words in the middle are common.
    draw_first = sampler({w: f**1.2 for w, f in words.items()}, ENGLISH_PICTURE_WORDS, rng)
    for length in lengths(ENGLISH_WORDS, 4, 20, rng):
        sentence = [w.capitalize() if w in CAPITALIZED or rng.random() < 0.02 else w for w in draw(length)]
        sentence = [re.sub(r"^i(?=$|['’])", "I", w) for w in sentence]
        sentence[0] = draw_first(1)[0].capitalize()
        if rng.random() < 0.3:
            sentence[rng.randrange(1, length)] = number(rng)
        if rng.random() < 0.7:
            sentence[length // 2] += ","
        before = rng.choice(["", " ", " "])
        yield before + " ".join(sentence) + rng.choice([*"......!?:;", '."'])


def sampler(
    frequencies: dict[str, float], picture_words: list[str], rng: random.Random
) -> Callable[[int], list[str]]:
    """A function that draws that many words."""
    weights = dict(frequencies)
    share = PICTURE_SHARE * sum(frequencies.values()) / len(picture_words)
    for word in picture_words:
        weights[word] = weights.get(word, 0.0) + share
    words, cumulative = list(weights), list(accumulate(weights.values()))
    return lambda count: rng.choices(words, cum_weights=cumulative, k=count)


def lengths(total: int, low: int, high: int, rng: random.Random) -> Iterator[int]:
    while total > 0:
        length = rng.randint(low, high)
        total -= length
        yield length


def number(rng: random.Random) -> str:
    ranges = (0, 9), (10, 99), (100, 999), (1950, 2030)
    return str(rng.choice([rng.randint(*bounds) for bounds in ranges]))


if __name__ == "__main__":
    run_main(main)
