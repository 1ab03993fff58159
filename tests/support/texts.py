"""Seeded texts that tokenizers get wrong: runs of space, control strings, repeats, every code point, and mixtures."""

import random
from collections.abc import Iterator, Sequence

SPACE_CONTEXTS = (
    *(("", ""), ("", "b"), ("a", "b"), ("a", "你"), ("你", "🎉"), ("\n", "\n"), ("a", "▁b"), ("\t", "]")),
    ("[REFERENCE_DOC_3]", "[REFERENCE_DOC_13]"),
)
CODE_POINT_CONTEXTS = (("", ""), ("a", "b"), (" ", " "), ("\n", "]"))
CONTEXTS = (
    *(("", ""), ("x", "y"), (" ", "]"), ("\n", ">"), ("[REFERENCE_DOC_3]", "[REFERENCE_DOC_13]")),
    *(("[REFERENCE_DOC_3]", ""), ("[REFERENCE_DOC_3][", "]"), ("[REFERENCE_DOC_3] ", " ")),
)
REPEATED = (*"!#%'()*+,-./<=>?[]_`acefiowx~—AFMX0\n\t\r\0é你🎉", "../", "()", "\\,", "ha", "la", "\u0301", "▁a")

SNIPPETS = (
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\x00", "▁", "▁▁", "\u00a0", "\u200b", "\u200d", "\ufe0f", "\u0301"),
    *("\ufeff", "\u2028", "\u3000", "\ufffd", "\U0010ffff", "\U000e0041", "a", "b", "I", "x", "Z", "é", "e\u0301", "ß"),
    *("ﬁ", "Ⅷ", "½", "ａ", "１", "0", "7", "2407", "3.14", "1e-5", "-", "--", "---", "=", "==", "*", "**", "/", "//"),
    *("#", "##", "_", "__", "[", "]", "[[", "]]", "<", ">", "</", "/>", "{", "}", "}}", "(", ")", "()", "[]", '"', "'"),
    *("`", "```", ",", ".", "...", "…", "!", "?", ":", ";", "|", "\\", "\\\\", "&", "$", "%", "@", "~", "^", "+"),
    *("the", " the", "The", " hello", "world", " return", "def", " import", "function", " {\n    ", "INST", "control"),
    *("_12", "REFERENCE_DOC_", "DOC_1", "s>", "unk", "0x41", "<0x", "<s", "[/"),
    *("你", "好", "你好", "世界", "。", "，", "日本語", "カタカナ", "ﾊﾝ", "한국어", "가", "ᄀ", "Привет", "ελληνικά"),
    *("مرحبا", "שלום", "नमस्ते", "ไทย", "த", "ქართული", "𝔘", "𝒳", "🎉", "👍🏽", "👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🇫🇷", "☺️", "𓀀", "𠮷"),
)


def all_texts(pieces: Sequence[str], *, seed: int, mixtures: int) -> list[str]:
    """Return every kind of text; `pieces` are the vocabulary's, of which the first 1027 are not text."""
    not_text = pieces[:1027]
    return [
        *(before + " " * length + after for length in range(1, 401) for before, after in SPACE_CONTEXTS),
        *(before + piece + after for piece in not_text for before, after in CONTEXTS),
        *(before + unit * count for unit in REPEATED for count in range(1, 101) for before in ("", " ", "a")),
        *every_code_point(),
        # The tokenizer puts nothing before a text that follows a reference document.
        *(f"[REFERENCE_DOC_0]{piece}" for piece in pieces[1027:]),
        *mixed_texts(not_text, seed=seed, count=mixtures),
    ]


def every_code_point() -> Iterator[str]:
    for code_point in (*range(0xD800), *range(0xE000, 0x10000)):
        before, after = CODE_POINT_CONTEXTS[code_point % len(CODE_POINT_CONTEXTS)]
        yield before + chr(code_point) + after


def mixed_texts(not_text: Sequence[str], *, seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(_mixed_part(rng, not_text) for _ in range(rng.randint(1, 14)))


def _mixed_part(rng: random.Random, not_text: Sequence[str]) -> str:
    kind = rng.choices(range(6), weights=(62, 15, 8, 5, 5, 5))[0]
    if kind == 0:
        return rng.choice(SNIPPETS)
    if kind == 1:
        return rng.choice(not_text[:20] if rng.random() < 0.5 else not_text[740:])
    if kind == 2:
        return " " * rng.randint(1, 40)
    if kind == 3:
        return rng.choice(SNIPPETS) * rng.randint(2, 40)
    if kind == 4:
        return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
    return "".join(rng.choices("abcdefghij klmnop qrst uvwxyzABC", k=rng.randint(1, 30)))
