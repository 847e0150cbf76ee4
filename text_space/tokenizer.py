"""From text to words: the same at training, at inference and for a query typed later.

In the authors' order: the first sentences of a text, then its words in lower case, without markup, punctuation, stop
words and short words, then only words that Doc2Vec knows, between a start and an end token. Every script stays as it
is. Chinese is segmented with rjieba. Japanese, Thai, Lao, Khmer and Burmese are written without blanks too and have no
segmenter here: their words are all overlapping pairs of characters.

The libraries that only some texts need (nltk, rjieba, stop-words) are imported where they are used.
"""

import html
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.schema import Settings
from text_space.english import ENGLISH_STOP_WORDS

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktLanguageVars

SPECIAL_WORDS = ("<pad>", "<start>", "<end>")
"""The first three entries of every vocabulary; no text holds them, words having neither < nor >."""
PAD, START, END = range(3)

RULED = ("zh", "ja")
"""Languages whose sentences end at 。 or the like wherever it stands, so that Punkt has nothing to learn."""
UNSEGMENTED = ("ja", "th", "lo", "km", "my")
"""Languages written without blanks that have no segmenter here."""
SHORT_WORDS = ("zh", "ko", *UNSEGMENTED)
"""Languages with words of one or two characters, where `text.min_word_length: null` means 1 and not 3."""

_HIDDEN = regex.compile(r"<!--|<(script|style)\b[^<>]*>", regex.IGNORECASE)
_HIDDEN_ENDS = {
    kind: regex.compile(end, regex.IGNORECASE)
    for kind, end in (("comment", "-->"), ("script", r"</script\s*>"), ("style", r"</style\s*>"))
}
_TAG = regex.compile(r"</?[a-z][^<>]*>|<[!?][^<>]*>", regex.IGNORECASE)
# Soft hyphens, byte order marks, and what makes an emoji of a digit or a symbol.
# Bringing n marks on one letter into order takes n² steps. Thirty are allowed where text is sent in pieces (UAX 15).
_STACKED = regex.compile(r"(\p{M}{30})\p{M}+")
_INVISIBLE = regex.compile(r"[\u00ad\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef\p{Me}]")
# A run of letters, digits and their marks. Joiners within it belong to it (Persian, Malayalam); so, at first, does an
# apostrophe: "won't" is a stop word, "won" is not.
_RUN = r"[\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}]*"
_RUN_WITH_JOINERS = rf"{_RUN}(?:[\u200c\u200d]{_RUN})*"
_WORD = regex.compile(rf"{_RUN_WITH_JOINERS}(?:['’]{_RUN_WITH_JOINERS})*")
_UNSPACED_SCRIPT = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")

# A blank line ends a sentence (a headline has no full stop); a single line break may only wrap a line.
_BLANK_LINE = regex.compile(r"\n\s*\n")
_RULED_SENTENCE = regex.compile(r"[^。！？；…｡!?\n]*(?:[。！？；…｡!?]+[”’」』）》】〉\"')\]]*|\n|$)")
# Beside the three that Punkt knows: Devanagari, Arabic, Urdu, Armenian, Ethiopic, Burmese, Khmer, Tibetan, Chinese.
_SENTENCE_ENDS = (".", "?", "!", "।", "॥", "؟", "۔", "։", "።", "၊", "။", "។", "།", "。", "！", "？")

PUNKT_CHARACTERS = 5_000_000
"""Punkt is trained on about so many characters: by then it has met the abbreviations, and a megabyte takes 2.4 s."""
_PUNKT_PART = 500_000  # characters that the trainer holds as tokens at a time


def primary_language(language: str) -> str:
    """ISO 639-1 code without region or script: `zh` for `zh-Hans` and `ZH_cn`."""
    return language.replace("_", "-").split("-")[0].lower()


def strip_markup(text: str) -> str:
    """`text` without HTML entities (escaped once or twice), comments, scripts, styles and tags."""
    text = html.unescape(html.unescape(text))
    return _TAG.sub(" ", _shown(text))


def _shown(text: str) -> str:
    """`text` without comments, scripts and styles, each to its own end; what has no end stays.

    Not one regular expression: it would look for the end of each of n beginnings in all that follows.
    """
    kept, at, endless = [], 0, set()
    for found in _HIDDEN.finditer(text):
        kind = "comment" if found[1] is None else "script" if len(found[1]) == 6 else "style"
        if found.start() < at or kind in endless:
            continue
        if end := _HIDDEN_ENDS[kind].search(text, found.end()):
            kept.append(text[at : found.start()])
            at = end.end()
        else:
            endless.add(kind)
    return " ".join([*kept, text[at:]])


def stop_words(language: str) -> frozenset[str]:
    """Stop words of a language, in lower case and with ' as apostrophe; empty where no list is known."""
    if language == "en":
        return ENGLISH_STOP_WORDS
    from stop_words import LANGUAGE_MAPPING, get_stop_words

    listed = get_stop_words(language) if language in LANGUAGE_MAPPING else []
    return frozenset(_normalise(word).replace("’", "'") for word in listed)


def _normalise(text: str) -> str:
    """One spelling for what looks the same (full-width letters, ligatures, composed accents), in lower case."""
    if not text.isascii():
        text = _STACKED.sub(r"\1", text)
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).lower()


# Sentences


def _language_variables() -> "PunktLanguageVars":
    from nltk.tokenize.punkt import PunktLanguageVars

    class LanguageVariables(PunktLanguageVars):
        sent_end_chars = _SENTENCE_ENDS

    return LanguageVariables()


def train_punkt(texts: Iterable[str], language: str) -> dict[str, Any]:
    """Learn where sentences end from raw texts: what `punkt.json` holds and `Tokenizer` takes.

    Keys: `language`, and for languages that Punkt serves `abbreviations`, `sentence_starters` (lists of str),
    `collocations` (list of pairs) and `orthographic_context` (counts of bits by word), all sorted.
    """
    language = primary_language(language)
    if language in RULED:
        return {"language": language}
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer(lang_vars=_language_variables())
    part: list[str] = []
    length = total = 0
    for text in texts:
        part.append(strip_markup(text))
        length += len(part[-1])
        if length >= _PUNKT_PART:
            trainer.train("\n\n".join(part), finalize=False)
            total, length, part = total + length, 0, []
            if total >= PUNKT_CHARACTERS:
                break
    trainer.train("\n\n".join(part), finalize=False)
    learnt = trainer.get_params()
    return {
        "language": language,
        "abbreviations": sorted(learnt.abbrev_types),
        "sentence_starters": sorted(learnt.sent_starters),
        "collocations": sorted(map(list, learnt.collocations)),
        "orthographic_context": dict(sorted(learnt.ortho_context.items())),
    }


def _punkt_splitter(parameters: dict[str, Any]) -> Callable[[str], Iterator[str]]:
    """A function from a paragraph to its sentences, lazily, by parameters that `train_punkt` returned."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    learnt = PunktParameters()
    learnt.abbrev_types.update(parameters.get("abbreviations", []))
    learnt.sent_starters.update(parameters.get("sentence_starters", []))
    learnt.collocations.update(map(tuple, parameters.get("collocations", [])))
    learnt.ortho_context.update(parameters.get("orthographic_context", {}))
    punkt = PunktSentenceTokenizer(learnt, lang_vars=_language_variables())
    return lambda paragraph: (paragraph[start:end] for start, end in punkt.span_tokenize(paragraph))


# Words


class Tokenizer:
    """Texts of one dataset to words, by `text` and `dataset.language` of `settings` and the parameters of Punkt.

    `punkt` is what `train_punkt` returned; it is used where `text.max_sentences` is set.
    """

    def __init__(self, settings: Settings, punkt: dict[str, Any]) -> None:
        self.language = primary_language(settings.dataset.language)
        self.max_sentences = settings.text.max_sentences
        self.min_length = settings.text.min_word_length or (1 if self.language in SHORT_WORDS else 3)
        self.stop_words = stop_words(self.language) if settings.text.stop_words else frozenset()
        self._punkt = punkt
        self._split: Callable[[str], Iterator[str]] | None = None

    def sentences(self, text: str, limit: int | None = None) -> list[str]:
        """The first `limit` sentences of `text` (all by default), without markup; none is without a word."""
        found = (part.strip() for part in self._parts(strip_markup(text)) if _WORD.search(part))
        return list(itertools.islice(found, limit))

    def _parts(self, text: str) -> Iterator[str]:
        if self.language in RULED:
            return (match[0] for match in _RULED_SENTENCE.finditer(text))
        if self._split is None:
            self._split = _punkt_splitter(self._punkt)
        return itertools.chain.from_iterable(map(self._split, _BLANK_LINE.split(text)))

    def words(self, text: str) -> list[str]:
        """The words of `text` that are kept, in order."""
        limit = self.max_sentences
        text = strip_markup(text) if limit is None else " ".join(self.sentences(text, limit))
        return [
            word
            for candidate in self._candidates(_normalise(text))
            if candidate not in self.stop_words
            for word in candidate.split("'")
            if len(word) >= self.min_length and word not in self.stop_words
        ]

    def _candidates(self, text: str) -> Iterator[str]:
        """Runs of letters and digits, apostrophes (as ') within them."""
        if self.language == "zh":
            import rjieba

            text = " ".join(rjieba.cut(text))
        for word in _WORD.findall(text):
            if self.language in UNSEGMENTED and _UNSPACED_SCRIPT.search(word):
                characters = regex.findall(r"\X", word)  # with their marks
                yield from map("".join, itertools.pairwise(characters)) if characters[1:] else [word]
            else:
                yield word.replace("’", "'")


def load_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer that step 1 trained in WORK; raises UserError where `punkt.json` is missing or broken."""
    return Tokenizer(settings, read_json(settings.work_folder / "doc2vec" / "punkt.json"))


# Vocabulary


def read_vocabulary(path: Path) -> dict[str, int]:
    """The number of each word in `vocabulary.txt`; raises UserError where it is missing or no vocabulary."""
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it and run train_doc2vec.py again") from None
    if tuple(words[: len(SPECIAL_WORDS)]) != SPECIAL_WORDS:
        raise UserError(
            f"{path} does not begin with {' '.join(SPECIAL_WORDS)}; remove it and run train_doc2vec.py again"
        )
    return {word: number for number, word in enumerate(words)}


def to_indices(words: Iterable[str], vocabulary: dict[str, int]) -> list[int]:
    """Numbers of the known words between <start> and <end>; empty without any."""
    known = [vocabulary[word] for word in words if word in vocabulary]
    return [START, *known, END] if known else []
