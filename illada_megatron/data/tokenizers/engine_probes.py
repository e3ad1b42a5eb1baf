"""Texts on which tokenizers are known to disagree. An engine that differs on one of them is not used."""

import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada_megatron.data.tokenizers.tokenizer import BOS_NAMES, EOS_NAMES, MASK_NAMES, Tokenizer

_HARD = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "a ",
    "  leading and trailing  ",
    "tabs\tand\r\nwindows\rlines\x0b\x0c\n\n\n\n \n  \n\t\n x",
    " \n \r\n \t \u00a0 \u2003 \u3000 \u2028 \u2029 \u0085 \u200b \ufeff x",
    "".join(map(chr, range(0x20))) + "".join(map(chr, range(0x7F, 0xA1))),
    "\0\0a\0b",
    "\ufeffbyte order mark",
    "naïve café cafe\u0301 a\u0300\u0301\u0302\u0303 ﬁ ﬀ Å \u212b Ω \u2126 ½ ² ① Ⅷ ǅ ß ẞ ſ İ ı K",
    "it's IT'S It'S we'll WE'LL they've I'd I'M you're 's 'S 'ſ ''s '\u2019s' don’t 'LL'll're've",
    "1 12 123 1234 12345 1,234,567.89 0x1F 1e-9 ١٢٣٤ १२३ ౧౨౩ ⅓ 𝟘𝟙𝟚 Ⅷ ²³ 3rd 4x4",
    "漢字かなカナ한국어 中文，标点。「引号」 ﾊﾝｶｸ Ｆｕｌｌｗｉｄｔｈ 𠀀𠮷 㐀",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 ❤️ ☺ 1️⃣ 🙂🙂🙂",
    "שלום עולם مرحبا بالعالم سلام\u200c‌ \u202eRTL\u202c हिन्दी ไทย ខ្មែរ မြန်မာ አማርኛ ქართული",
    "Привет мир, Γειά σου Κόσμε! смешанныйmixedκείμενο漢字mixed",
    "𝕬𝖓𝖈𝖎𝖊𝖓𝖙 𐍈𐌰 𒀀𒁀 𓀀 \U0001f9ff \U0010ffff \U000e0001 ᠮᠣᠩ\u180eᠭᠣᠯ",
    "a literal \u2581 space sign, \u2581\u2581 two,\u2581x and at the end \u2581",
    "\u2581",
    "unknown \u2585 \ufffd\ufffd \ufffe \uffff \ue000 \uf8ff",
    "<0x41> <0x0A> <unk> <unk><unk> [UNK] Ġ Ċ ĠĠ ## ##ing </w> @@ ▁",
    "def f(x):\n    return {'a': [1, 2.5, None], **x}  # ok?\n\n\tif(!a&&b||c->d){i++;}\r\n}\n",
    "http://user@example.org:80/~a/b?c=d&e=%20#f <a href='x'>&nbsp;</a> \\u00e9 \\n $\\alpha_{i}^2$ --------- ======",
    " " * 3_000 + "x" + "\n" * 3_000 + "\t" * 1_000 + "\r\n" * 1_000,
    "-" * 5_000 + "=" * 5_001 + "." * 300 + "!?" * 500,
    "0123456789" * 1_000,
    "é" * 3_000 + "漢" * 3_000 + "🙂" * 1_000,
]

_LONG_WORD = 100_000
_TRICKY = [
    *" \n\t\r'\"’.,;:!?()[]{}<>/\\|-_=+*&^%$#@~`",
    *"aAzZsStTlLdDmMrReEvV019éßİſΩжשع漢あア한",
    *"\u0301\u0308\u200d\ufe0f\u200b\u00a0\u3000\u2028\x0b\x85\u0660\u00b2½Ⅷ🙂👍\U0001f3fd\U00020000\ufffd\0",
    *["  ", "\n\n", "\r\n", "    ", "'s", "'LL", "123", "the", " of", "Hello", "\u0e33", "ǅ"],
]


def probe_texts(tokenizer: Tokenizer, added_names: list[str], seed: int = 0) -> list[str]:
    """The same texts for the same tokenizer: hard cases, special tokens spelled out, random Unicode, all its tokens.

    added_names: the tokenizer's special and added tokens."""
    generator = random.Random(seed)
    return [
        *_HARD,
        *_special_names(added_names),
        *_long_words(generator),
        *_random(generator),
        *_all_tokens(tokenizer),
    ]


def _special_names(added_names: list[str]) -> list[str]:
    """Special tokens as text, alone, glued and cut: the corpus must not be able to forge one."""
    usual = [*MASK_NAMES, *BOS_NAMES, *EOS_NAMES, "<pad>", "<sep>", "<unk>", "<|im_start|>"]
    names = [*dict.fromkeys([*added_names[:100], *added_names[-20:], *usual])]
    glued = [f"a{name}b {name} {name}{name}\n{name.upper()} {name[:-1]} {name[1:]} '{name}'" for name in names]
    return [*names, *glued, "".join(names), " ".join(names)]


def _long_words(generator: random.Random) -> list[str]:
    """Words without an end; such a document is usually data in base64 or a minified bundle."""
    letters = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=_LONG_WORD // 4))
    base64 = "".join(generator.choices("ABCDEFGHIJabcdefghij0123456789+/", k=_LONG_WORD // 4))
    return ["x" * _LONG_WORD, letters, base64, "ab" * (_LONG_WORD // 20) + " end"]


def _random(generator: random.Random) -> list[str]:
    """Random strings of the tricky alphabet, and of assigned characters of all of Unicode in the usual company."""
    tricky = ["".join(generator.choices(_TRICKY, k=generator.randint(1, 80))) for _ in range(500)]
    assigned = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    rare = [generator.choice(assigned) for _ in range(2_000)]
    company = [f'a{c}1 {c}b\n{c}", {c}{c}' for c in rare]
    anything = [*range(0xD800), *range(0xE000, 0x110000)]
    noise = ["".join(map(chr, generator.choices(anything, k=50))) for _ in range(50)]
    return [*tricky, *("".join(company[i : i + 40]) for i in range(0, len(company), 40)), *noise]


def _all_tokens(tokenizer: Tokenizer) -> list[str]:
    """Each token's text once, in an order that puts strangers together: every merge is used."""
    ids = list(range(tokenizer.vocab_size))
    random.Random(len(ids)).shuffle(ids)
    groups = (ids[start : start + 200] for start in range(0, len(ids), 200))
    return [text.replace("\ufffd", "") for text in map(tokenizer.decode, groups)]


_NEIGHBOURS = '"aA1 \n'


def write_boundary_tokenizer(tokenizer_json: Path, output: Path) -> bool:
    """Write a tokenizer that cuts text into words as `tokenizer_json` does, but whose ids betray every cut.

    Libraries bring tables of Unicode of different years: whether a rare character is a letter decides where a word
    ends, which changes the ids only where the vocabulary has a token across the cut. Here each byte has a token with
    each of its usual neighbours, so that a difference in a table always shows.

    Returns False, and writes nothing, for other than byte-level BPE."""
    definition = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    if definition["model"].get("type") != "BPE" or '"ByteLevel"' not in json.dumps(definition.get("pre_tokenizer")):
        return False
    characters = _byte_characters()
    vocab = {character: byte for byte, character in enumerate(characters)}
    merges: list[list[str]] = []
    for neighbour in (characters[ord(character)] for character in _NEIGHBOURS):
        for pair in [pair for c in characters for pair in ([c, neighbour], [neighbour, c])]:
            if "".join(pair) not in vocab:
                vocab["".join(pair)] = len(vocab)
                merges.append(pair)
    model: dict[str, Any] = {**definition["model"], "vocab": vocab, "merges": merges, "unk_token": None}
    synthetic = {**definition, "model": model, "added_tokens": [], "post_processor": None}
    output.write_text(json.dumps(synthetic), encoding="utf-8")
    return True


def boundary_texts() -> list[str]:
    """For the tokenizer of write_boundary_tokenizer: each character in all neighbourhoods, half a million in all."""
    each = [f'"{c}" a{c}A{c}1 {c}\n{c}{c}a' for c in _characters()]
    return ["".join(each[start : start + 16]) for start in range(0, len(each), 16)]


def _characters() -> Iterator[str]:
    """The Basic Multilingual Plane; of the uniform blocks (ideographs, Hangul, private use) and what is above, some."""
    for code in range(0xD800):
        if not (0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4) or code % 64 == 0:
            yield chr(code)
    yield from map(chr, range(0xE000, 0xF900, 64))
    yield from map(chr, range(0xF900, 0x10000))
    yield from map(chr, range(0x10000, 0x20000, 16))
    yield from map(chr, range(0x20000, 0x110000, 1024))


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
