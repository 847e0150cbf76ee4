"""From text to words: what is kept of which script, where sentences end, and what an import costs."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer

from pipeline.errors import UserError
from pipeline.schema import Text
from text_space import tokenizer as tokenizer_module
from text_space.english import GENSIM_STOP_WORDS
from text_space.tokenizer import (
    LONGEST_SENTENCE,
    Tokenizer,
    primary_language,
    read_vocabulary,
    stop_words,
    strip_markup,
    to_indices,
    train_punkt,
)


def tokenizer(language: str = "en", punkt: dict | None = None, **text: object) -> Tokenizer:
    return Tokenizer(Text(**text), language, punkt or {"language": language})


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Senate voted on Tuesday.", "senate voted tuesday"),
        ("<p class='lead'>Fire&nbsp;in a <b>computer</b> room</p>", "room"),
        ("AT&amp;T&#8217;s caf&eacute;; &amp;quot;naïve&amp;quot; &lt;br&gt;", "café naïve"),
        ("<!-- hidden words --><style>p {color: red}</style>shown<script>let gone</script>", "shown"),
        ("a < b and c > d, 3<4", ""),
        ("x <y and wider", "wider"),
        ("They won't say who won; don’t ask Obama's aide", "won ask obama aide"),
        ("e-mail: first.last@example.org/path_name", "mail example org path"),
        ("CAFE\u0301 ﬁnal ２０２０", "café final 2020"),
        ("co\u00adoperation", "cooperation"),
        ("1\ufe0f\u20e3 \u2764\ufe0f 👩‍🚀🇫🇷 \U0001f600", ""),
        ("in 2014 of the 7", "2014"),
        ("Москва́ и Київ", "москва́ київ"),
        ("", ""),
        ("?! … \x00 \ud800", ""),
    ],
)
def test_english_keeps_words_that_say_something(text: str, words: str) -> None:
    assert tokenizer().words(text) == words.split()


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("hi", "यह पहला वाक्य है। दूसरा वाक्य यहाँ! तीसरा नहीं।", "पहला वाक्य दूसरा वाक्य"),
        ("ar", "ذهب هذا الطالب؟ كتاب جديد. الثالث", "ذهب الطالب كتاب جديد"),
        ("fa", "کتاب‌ها", "کتاب\u200cها"),
        ("ru", "Она читает книгу. Он спит. Третье предложение.", "читает книгу спит"),
        ("fr", "L’homme n'est pas là", "homme"),
        ("ko", "학교에 간다", "학교에 간다"),
        ("zh", "国产大飞机C919在上海首飞。", "国产 大 飞机 c919 上海 首飞"),
        ("ja", "東京の天気", "東京 京の の天 天気"),
        ("th", "ไทย", "ไท ทย"),
        ("ja", "雨 NHK", "雨 nhk"),
    ],
)
def test_other_scripts_stay_as_they_are(language: str, text: str, words: str) -> None:
    assert tokenizer(language).words(text) == words.split(" ")


def test_settings_of_words() -> None:
    text = "The fox is at a den. It sleeps. It wakes."
    assert tokenizer(stop_words=False).words(text) == "the fox den sleeps".split()
    assert tokenizer(min_word_length=5).words(text) == ["sleeps"]
    assert tokenizer(max_sentences=1).words(text) == ["fox", "den"]
    assert tokenizer(max_sentences=None).words(text) == ["fox", "den", "sleeps", "wakes"]
    assert tokenizer("zh", min_word_length=2).words("他在上海大学看书") == ["上海大学", "看书"]


def test_stop_words() -> None:
    assert {"the", "won't", "amongst"} <= stop_words("en") and not {"man", "room", "face"} & stop_words("en")


def test_english_stop_words_are_gensims() -> None:
    from gensim.parsing.preprocessing import STOPWORDS

    assert GENSIM_STOP_WORDS == STOPWORDS and len(STOPWORDS) == 337
    assert "的" in stop_words("zh") and "und" in stop_words("de")
    assert stop_words("xx") == frozenset()
    assert [primary_language(code) for code in ("en", "zh-Hans", "ZH_cn")] == ["en", "zh", "zh"]


@given(st.text())
@example("<a<b>c>d</script")
@example("'’'\u200d\u0301'a’")
def test_any_text_gives_words(text: str) -> None:
    for language in ("en", "ja", "zh"):
        for word in tokenizer(language).words(text):
            assert word == word.lower() and word not in stop_words(language)
            assert not set(word) & set("<>&'’ \t\n\r\x85\u2028") and len(word) >= (3 if language == "en" else 1)


@given(st.sampled_from("b div script h1 custom-tag".split()), st.text("abc \n='\"/", max_size=20))
def test_no_word_comes_from_a_tag(tag: str, attributes: str) -> None:
    text = f"before <{tag} {attributes}>inner</{tag}> after &lt;{tag}&gt;"
    inner = [] if tag == "script" else ["inner"]
    # An escaped <script> opens a script that nothing closes: its tag goes, what follows stays.
    assert tokenizer(stop_words=False, max_sentences=None).words(text) == ["before", *inner, "after"]


# Sentences


def test_sentences() -> None:
    english = tokenizer()
    text = "A <i>headline</i>\n\nIt is 3.14 in all.  “Yes!” he said\non two lines. ... Last"
    assert english.sentences(text) == [
        "A  headline",
        "It is 3.14 in all.",
        "“Yes!”",
        "he said\non two lines.",
        "... Last",
    ]
    assert english.sentences(text, 2) == ["A  headline", "It is 3.14 in all."]
    assert english.sentences(" \n ") == []


def test_chinese_sentences() -> None:
    chinese = tokenizer("zh")
    text = "“走吧！”他说。快看……真的？是；\n标题没有句号\n最后"
    assert chinese.sentences(text) == ["“走吧！”", "他说。", "快看……", "真的？", "是；", "标题没有句号", "最后"]


NEWS = [f"Mr. Smith of Acme Corp. met Dr. Jones on day {n}. They talked. Nobody knows of what." for n in range(40)]


def test_punkt_learns_abbreviations_and_survives_json() -> None:
    punkt = train_punkt(NEWS, "en")
    read_back = json.loads(json.dumps(punkt))
    assert {"mr", "dr"} <= set(read_back["abbreviations"])
    fresh, reread, untrained = tokenizer(punkt=punkt), tokenizer(punkt=read_back), tokenizer()
    text = "Dr. Brown met Mr. White. They talked."
    assert reread.sentences(text) == ["Dr. Brown met Mr. White.", "They talked."]
    assert untrained.sentences(text) != reread.sentences(text)
    assert [fresh.sentences(text) for text in NEWS] == [reread.sentences(text) for text in NEWS]


def test_punkt_parameters_are_sorted_and_may_be_few() -> None:
    punkt = train_punkt(NEWS, "en")
    assert list(punkt["orthographic_context"]) == sorted(punkt["orthographic_context"])
    assert punkt["abbreviations"] == sorted(punkt["abbreviations"])
    assert train_punkt([], "en")["abbreviations"] == []
    assert train_punkt(["。"], "zh") == {"language": "zh"}


SENTENCES = [
    *NEWS[:2],
    '"Quoted." (In brackets.) -- a dash',
    "wait... what",
    "The U.S. Army left. A. B. Smith said so.\nHe did",
]
SENTENCES += ["1. First 2. Second", "It cost 3.5 dollars.' He said: 'no.'", " . . . ", "?!", "no full stop"]


@given(st.lists(st.sampled_from(SENTENCES), max_size=12), st.sampled_from([" ", "\n", "  "]), st.integers(5, 100))
def test_sentences_of_pieces_are_those_of_the_whole_text(parts: list[str], blank: str, piece: int) -> None:
    text, splitter = blank.join(parts), tokenizer(punkt=train_punkt(NEWS, "en"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizer_module, "PIECE", 10**9)
        whole = splitter.sentences(text)
        patched.setattr(tokenizer_module, "PIECE", piece)
        pieces = splitter.sentences(text)
    assert [re.findall(r"\w+", sentence) for sentence in pieces] == [re.findall(r"\w+", one) for one in whole]


@pytest.mark.parametrize("unit", [". . . ", ". ", "Mr. ", "a. ", "no full stop ", "!)", "x"])
def test_the_work_of_punkt_grows_with_the_text_and_no_faster(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted in characters, in those of one call too: NLTK ends a match after some time, with an error."""
    given_to_punkt: list[int] = []
    split = PunktSentenceTokenizer.span_tokenize

    def counted(self: PunktSentenceTokenizer, text: str) -> Iterator[tuple[int, int]]:
        given_to_punkt.append(len(text))
        return split(self, text)

    monkeypatch.setattr(PunktSentenceTokenizer, "span_tokenize", counted)
    splitter = tokenizer(punkt=train_punkt(NEWS, "en"))
    for size in (100_000, 200_000):
        given_to_punkt.clear()
        splitter.sentences((unit * size)[:size])
        assert sum(given_to_punkt) <= 3 * size and max(given_to_punkt, default=0) <= LONGEST_SENTENCE
    if "." in unit and unit.strip(". ") == "":
        assert not given_to_punkt


def test_punkts_trainer_gets_no_endless_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[int] = []
    words = PunktLanguageVars.word_tokenize

    def counted(self: PunktLanguageVars, line: str) -> list[str]:
        lines.append(len(line))
        return words(self, line)

    monkeypatch.setattr(PunktLanguageVars, "word_tokenize", counted)
    train_punkt([". . . " * 50_000, "word " * 50_000, "x" * 250_000], "en")
    assert sum(lines) > 740_000 and max(lines) <= 101_000


# Vocabulary and markup


def test_to_indices() -> None:
    vocabulary = {"<pad>": 0, "<start>": 1, "<end>": 2, "fox": 3, "den": 4}
    assert to_indices(["fox", "sleeps", "den", "fox"], vocabulary) == [1, 3, 4, 3, 2]
    assert to_indices(["sleeps"], vocabulary) == [] == to_indices([], vocabulary)


def test_read_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    with pytest.raises(UserError, match="train_doc2vec.py"):
        read_vocabulary(path)
    path.write_text("<pad>\n<start>\n<end>\nfuchs\n狐狸\n")
    assert read_vocabulary(path) == {"<pad>": 0, "<start>": 1, "<end>": 2, "fuchs": 3, "狐狸": 4}
    path.write_text("fuchs\n")
    with pytest.raises(UserError, match="does not begin with <pad>"):
        read_vocabulary(path)


def test_markup_goes_before_sentences() -> None:
    assert strip_markup("One.<br>Two &amp;amp; <b>three</b>") == "One. Two &  three "


def test_importing_text_needs_no_other_library() -> None:
    code = "import sys, text_space.tokenizer; heavy = {'gensim', 'nltk', 'rjieba', 'stop_words', 'torch'}; "
    code += "print(sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
