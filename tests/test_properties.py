"""What holds for any input: manifests, settings, tokens, losses. run_tests.sh tries 1,000 examples of each.

Every property is tried in this process, so that a thousand examples take seconds.
"""

import csv
import gzip
import io
import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import losses
from pipeline.command_line import make_parser, parse_settings
from pipeline.errors import UserError
from pipeline.schema import Settings
from pipeline.settings import fields, flatten, load_settings, mistakes, plain_type
from readers.manifest import read_manifest
from readers.selection import read_table
from readers.tables import RECORDS
from text_space.tokenizer import Tokenizer, _shown, train_punkt
from training.fine_grained import pairwise_similarity_loss

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too
folder_stays = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# Manifests

WORDS = st.sampled_from(
    [
        *(
            "image",
            "text",
            "image_id",
            "category",
            "split",
            "a.png",
            "../a.png",
            "/etc/passwd",
            "train",
            "val",
            "x",
            "",
        ),
        *("\x00", "\ufeff", '"', '""', ",", "\t", "\r", "\n", "\r\n", "\\", "\ud800", "é", "图"),
        *("{", "}", "[", ":", "null"),
    ]
)
CELLS = st.one_of(
    WORDS, ANY_TEXT, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(st.integers(), max_size=2)
)
HEADERS = st.lists(st.sampled_from(["image", "text", "image_id", "category", "split", "other"]), max_size=6)


def read(path: Path, content: bytes) -> int:
    """The rows that a manifest of these bytes gives, as step 0 reads it; its mistakes are UserErrors of one line."""
    path.write_bytes(content)
    try:
        table, rejected = read_table(read_manifest(path, path.parent))
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 2000
        return 0
    assert set(rejected) <= set(range(len(table)))
    for position, row in enumerate(table.to_pylist()):
        if position not in rejected:
            assert row["text"].strip() and row["image_path"] and ".." not in row["image_path"].split("/")
            assert not row["image_path"].startswith("/")
    return len(table)


def as_csv(header: list[str], records: list[list[Any]], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([header, *records])
    return file.getvalue().encode(errors="surrogatepass")


def mutated(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """`content` with some stretches replaced; places are taken modulo its length."""
    for place, length, replacement in changes:
        place %= len(content) + 1
        content = content[:place] + replacement + content[place + length :]
    return content


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 5000),
        st.integers(0, 8),
        st.one_of(st.binary(max_size=8), WORDS.map(lambda w: w.encode(errors="surrogatepass"))),
    ),
    max_size=4,
)
RECORD_LISTS = st.tuples(HEADERS, st.lists(st.lists(CELLS, max_size=7), max_size=4))


@folder_stays
@given(suffix=st.sampled_from(sorted(RECORDS)), content=st.binary(max_size=200))
@example(suffix=".csv", content=b"image,text\n\xff\xfe,\x00\n")
@example(suffix=".jsonl", content=b'{"image": "a", "text": "\\ud800"}\n')
def test_any_bytes_are_rows_or_a_mistake(tmp_path: Path, suffix: str, content: bytes) -> None:
    read(tmp_path / f"pairs{suffix}", content)


@folder_stays
@given(suffix=st.sampled_from([".csv", ".tsv"]), table=RECORD_LISTS, changes=CHANGES)
def test_any_delimited_table_is_rows_or_a_mistake(tmp_path: Path, suffix: str, table: Any, changes: Any) -> None:
    content = as_csv(["image", "text", *table[0]], table[1], "," if suffix == ".csv" else "\t")
    read(tmp_path / f"pairs{suffix}", mutated(content, changes))


JSON = st.recursive(CELLS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3))


@folder_stays
@given(
    records=st.lists(
        st.fixed_dictionaries(
            {"image": JSON, "text": JSON}, optional={"split": JSON, "category": JSON, "image_id": JSON}
        )
        | JSON,
        max_size=4,
    ),
    changes=CHANGES,
)
def test_any_json_lines_are_rows_or_a_mistake(tmp_path: Path, records: list[Any], changes: Any) -> None:
    content = "\n".join(map(json.dumps, records)).encode()
    read(tmp_path / "pairs.jsonl", mutated(content, changes))
    read(tmp_path / "pairs.json", mutated(json.dumps(records).encode(), changes))
    read(tmp_path / "pairs.jsonl.gz", mutated(gzip.compress(content), changes))


COLUMN_TYPES = st.sampled_from(
    [
        *(pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.null()),
        *(pa.timestamp("ns"), pa.timestamp("ms", "Nowhere/None"), pa.duration("s"), pa.decimal128(5)),
        *(pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8())),
        pa.dictionary(pa.int8(), pa.string()),
    ]
)
VALUES: dict[str, Callable[[int], Any]] = {
    "string": lambda n: ["a.png", "", "x", "../y", "train"][n % 5],
    "binary": lambda n: [b"a.png", b"\xff\xfe", b"", b"val"][n % 4],
}


def column(kind: pa.DataType, numbers: list[int]) -> pa.Array:
    """A column of a type, of small values made from the numbers, and invalid UTF-8 where the type allows it."""
    if pa.types.is_string(kind) and sum(numbers) % 3 == 0:  # Arrow does not look whether it is UTF-8
        return pa.array([VALUES["binary"](n) for n in numbers], pa.binary()).view(pa.string())
    if pa.types.is_dictionary(kind) or ("string" in str(kind) and not pa.types.is_nested(kind)):
        return pa.array([VALUES["string"](n) for n in numbers], pa.string()).cast(kind)
    if pa.types.is_binary(kind):
        return pa.array([VALUES["binary"](n) for n in numbers], kind)
    if pa.types.is_map(kind):
        return pa.array([[("k", 1)]] * len(numbers), kind)
    if pa.types.is_list(kind):
        return pa.array([["a"] * (n % 3) for n in numbers], kind)
    if pa.types.is_struct(kind):
        return pa.array([{"a": n % 100} for n in numbers], kind)
    if pa.types.is_integer(kind):
        return pa.array([n - 2**62 for n in numbers], kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(numbers))
    if pa.types.is_boolean(kind):
        return pa.array([n % 2 == 0 for n in numbers])
    if pa.types.is_floating(kind):
        return pa.array([math.inf if n % 2 else math.nan for n in numbers])
    if pa.types.is_decimal(kind):
        return pa.array([n % 100 for n in numbers], pa.int64()).cast(pa.decimal128(19)).cast(kind, safe=False)
    wide = pa.int32() if pa.types.is_date32(kind) else pa.int64()
    return pa.array([(n * 10**15) % 2**31 if wide == pa.int32() else n * 10**15 for n in numbers], wide).view(kind)


@folder_stays
@given(
    image=COLUMN_TYPES,
    text=COLUMN_TYPES,
    others=st.dictionaries(st.sampled_from(["image_id", "category", "split", "other"]), COLUMN_TYPES, max_size=3),
    numbers=st.lists(st.integers(0, 2000), max_size=4),
    changes=st.just([]) | CHANGES,
)
@example(image=pa.string(), text=pa.string(), others={}, numbers=[0, 3], changes=[])
@example(image=pa.timestamp("ms", "Nowhere/None"), text=pa.string(), others={}, numbers=[0, 1], changes=[])
def test_any_parquet_file_is_rows_or_a_mistake(
    tmp_path: Path, image: Any, text: Any, others: dict[str, Any], numbers: list[int], changes: Any
) -> None:
    columns = {"image": image, "text": text, **others}
    file = io.BytesIO()
    pq.write_table(pa.table({name: column(kind, numbers) for name, kind in columns.items()}), file)
    content = file.getvalue()
    if sum(numbers) % 2:  # what stands in the footer decides what is read
        changes = [(len(content) - 8 - place, length, new) for place, length, new in changes]
    read(tmp_path / "pairs.parquet", mutated(content, changes))


@folder_stays
@given(
    texts=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=5),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    bom=st.booleans(),
)
def test_good_manifests_are_read_as_they_were_written(tmp_path: Path, texts: list[str], suffix: str, bom: bool) -> None:
    records = [{"image": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" * bom + "\r\n".join(map(json.dumps, records)).encode())
    else:
        table = [list(record.values()) for record in records]
        path.write_bytes(b"\xef\xbb\xbf" * bom + as_csv(["image", "text"], table, "," if suffix == ".csv" else "\t"))
    assert [row.text for row in read_manifest(path, tmp_path) if not row.rejected] == texts


def test_every_format_of_a_manifest_is_tried() -> None:
    tried = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}
    assert {suffix.removesuffix(".gz") for suffix in RECORDS} == tried


# Settings

NAMES = sorted(flatten(Settings()))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["yes", "1e-3", "nan", "inf", "-1", "[1, 2]", "{a: 1}", "null", "$HOME", "x/y", "manifest", "gru"]),
)
VALUE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
)
SOME_NAMES = st.sampled_from([*NAMES, "training", "model.text", "nothing", "training.nothing", "seed.x", "config", ""])


def parsed(words: list[str]) -> Settings | None:
    """Settings of a command line, None where it is refused in one line."""
    try:
        found = parse_settings(make_parser("A script."), words)[0]
    except UserError as error:
        assert str(error).strip()
        return None
    assert not mistakes(found)
    return found


@folder_stays
@given(tree=st.dictionaries(SOME_NAMES, VALUE, max_size=3), dotted=st.booleans())
def test_any_tree_of_settings_is_taken_or_refused(tmp_path: Path, tree: dict[str, Any], dotted: bool) -> None:
    nested: dict[str, Any] = tree if dotted else {}
    if not dotted:
        for name, value in tree.items():
            *sections, last = name.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    break
            else:
                place[last] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(nested, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    parsed(["--config", str(path)])


@folder_stays
@given(content=st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_config_file_is_taken_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    parsed(["--config", str(path)])


FLAG_VALUES = st.one_of(SCALARS.map(str), st.text(max_size=6))


@folder_stays
@given(
    flags=st.lists(st.tuples(SOME_NAMES, FLAG_VALUES, st.sampled_from(["{} {}", "{}={}", "{}+={}", "{}"])), max_size=2)
)
def test_any_flags_are_taken_or_refused(tmp_path: Path, flags: list[tuple[str, str, str]]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    words = []
    for name, value, form in flags:
        assume(name != "config" and "\x00" not in value and value not in ("-h", "--help", "--help-all"))
        words += form.format(f"--{name}", value).split(" ", 1)
    parsed(["--config", str(config), *words])


RIGHT: dict[Any, st.SearchStrategy] = {
    int: st.integers(10, 60),
    float: st.floats(0.01, 0.4),
    bool: st.booleans(),
    list[int]: st.lists(st.integers(2, 9), min_size=2, max_size=2),
}


@given(st.data())
def test_right_values_are_taken_as_they_were_written(data: st.DataObject) -> None:
    kinds = {name: plain_type(field) for name, field, _ in fields() if plain_type(field) in RIGHT}
    name = data.draw(st.sampled_from(sorted(kinds)))
    value = data.draw(RIGHT[kinds[name]])
    assert flatten(load_settings({name: value})) == flatten(Settings()) | {name: value}


# Tokens

LANGUAGES = ("en", "de", "zh", "ja", "th", "ko", "ar", "hi", "my", "xx")
PUNKT = {language: train_punkt(["Dr. No came. He left.", "It is 3 p.m. now."] * 3, language) for language in LANGUAGES}
MARKED_UP = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=()), max_size=20),
        st.sampled_from(
            ["<b>", "</b>", "<!--", "-->", "<script>", "</script >", "<", ">", "&amp;lt;", "&#0;", "&#xD800;"]
        ),
        st.sampled_from(
            ["won't", "İ", "ﬁ", "ß", "Ａ", "\u200d", "\u0301" * 40, "Dr. ", "! ", "。", "\n\n", "\u2028", "ปลา"]
        ),
    ),
    max_size=8,
).map("".join)


def tokenizer(language: str, sentences: int | None) -> Tokenizer:
    chosen = Settings()
    chosen.dataset.language, chosen.text.max_sentences = language, sentences
    return Tokenizer(chosen.text, chosen.dataset.language, PUNKT[language])


@given(text=MARKED_UP, language=st.sampled_from(LANGUAGES), sentences=st.sampled_from([None, 1, 2]))
def test_any_text_becomes_words(text: str, language: str, sentences: int | None) -> None:
    tokens = tokenizer(language, sentences)
    words = tokens.words(text)
    assert words == tokens.words(text)
    for word in words:
        assert word == word.strip() and not any(character.isspace() or character in "<>" for character in word)
        assert len(word) >= tokens.min_length and word not in tokens.stop_words and word == word.lower()
    if sentences:  # no sentence is made up, none is lost before the limit
        assert len(tokens.sentences(text, sentences)) <= sentences
        assert tokens.sentences(text, sentences) == tokens.sentences(text)[:sentences]


@given(text=MARKED_UP, language=st.sampled_from(["en", "de", "ko", "ar", "hi", "xx"]))
def test_words_of_words_are_the_words(text: str, language: str) -> None:
    """Where blanks part words: segmenters and pairs of characters see other neighbors the second time."""
    tokens = tokenizer(language, None)
    assert tokens.words(" ".join(tokens.words(text))) == tokens.words(text)


@given(
    st.lists(
        st.sampled_from(["<!--", "-->", "<script>", "<SCRIPT a>", "</script >", "<style>", "</Style>", "a", ">", "<"])
    )
)
def test_what_is_hidden_in_markup_is_what_one_expression_finds(parts: list[str]) -> None:
    hidden = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
    assert _shown("".join(parts)) == hidden.sub(" ", "".join(parts))


# Losses: each against a plain loop over what the paper writes


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """A batch of 1 to 8 anchors with positives, and as many negatives; any mask."""
    size, dimensions = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def unit(*shape: int) -> torch.Tensor:
        vectors = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):  # equal and opposite vectors, where gradients may be none
            vectors = vectors.sign() + (vectors == 0)
        return torch.nn.functional.normalize(vectors, dim=-1)

    mask = torch.rand(size, size, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return {
        "a": unit(size, dimensions),
        "p": unit(size, dimensions),
        "n": unit(size, dimensions),
        "mask": mask,
        "order": torch.randperm(size, generator=generator),
        "other_order": torch.randperm(size, generator=generator),
    }


def loop(batch: dict[str, Any], of_anchor: Callable[[list[float]], float], bracket: Callable[..., float]) -> float:
    """The mean over anchors of a function of the brackets of their negatives (Eq. 3)."""
    a, p, n = (batch[name].tolist() for name in "apn")
    total = 0.0
    for i in range(len(a)):
        total += of_anchor([bracket(a[i], p[i], n[j]) for j in range(len(n)) if batch["mask"][i, j]])
    return total / len(a)


def dot(x: list[float], y: list[float]) -> float:
    return sum(u * v for u, v in zip(x, y, strict=True))


def squared(x: list[float], y: list[float]) -> float:
    return sum((u - v) ** 2 for u, v in zip(x, y, strict=True))


def check(loss: Callable[..., torch.Tensor], batch: dict[str, Any], expected: float) -> None:
    """The value of a loss, that it is at least 0, that its gradient is finite, and that the order says nothing."""
    inputs = [batch[name].clone().requires_grad_() for name in "apn"]
    value = loss(*inputs, batch["mask"])
    assert math.isclose(value.item(), expected, rel_tol=1e-9, abs_tol=1e-9)
    assert value.item() >= 0
    value.backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    i, j = batch["order"], batch["other_order"]
    permuted = loss(batch["a"][i], batch["p"][i], batch["n"][j], batch["mask"][i][:, j])
    assert math.isclose(permuted.item(), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(batch=batches(), t=st.floats(0.01, 5), weight=st.floats(0.1, 64))
def test_angular_logsumexp_is_wangs_formula(batch: dict[str, Any], t: float, weight: float) -> None:
    expected = loop(
        batch,
        lambda brackets: math.log1p(weight * sum(map(math.exp, brackets))),
        lambda a, p, n: 4 * t * (dot(a, n) + dot(p, n)) - 2 * (1 + t) * dot(a, p),
    )
    check(
        lambda *inputs: losses.angular_npairs_loss(*inputs, tan_squared_alpha=t, negatives_weight=weight),
        batch,
        expected,
    )


@given(batch=batches(), t=st.floats(0.01, 5))
def test_angular_hinge_is_equation_2(batch: dict[str, Any], t: float) -> None:
    def bracket(a: list[float], p: list[float], n: list[float]) -> float:
        centre = [(u + v) / 2 for u, v in zip(a, p, strict=True)]
        return max(0.0, squared(a, p) - 4 * t * squared(n, centre))

    check(
        lambda *inputs: losses.angular_npairs_loss(*inputs, tan_squared_alpha=t, form="hinge"),
        batch,
        loop(batch, sum, bracket),
    )


@given(batch=batches(), margin=st.floats(0.01, 2))
def test_triplet_is_equation_1(batch: dict[str, Any], margin: float) -> None:
    expected = loop(batch, sum, lambda a, p, n: max(0.0, squared(a, p) - squared(a, n) + margin))
    check(lambda *inputs: losses.triplet_npairs_loss(*inputs, margin=margin), batch, expected)


@given(batch=batches(), margin=st.floats(0.01, 2))
def test_group_ranking_is_wangs_sum(batch: dict[str, Any], margin: float) -> None:
    group, others = batch["mask"], ~batch["mask"]
    a, n = batch["a"].tolist(), batch["n"].tolist()

    def distance(x: list[float], y: list[float]) -> float:
        return math.sqrt(max(0.0, 2 - 2 * dot(x, y)) + 1e-4)

    expected = sum(
        max(0.0, margin + distance(a[i], n[j]) - distance(a[i], n[k]))
        for i in range(len(a))
        for j in range(len(n))
        for k in range(len(n))
        if group[i, j] and others[i, k]
    ) / len(a)
    anchors, candidates = batch["a"].clone().requires_grad_(), batch["n"].clone().requires_grad_()
    value = losses.group_ranking_loss(anchors, candidates, group, others, margin=margin)
    assert math.isclose(value.item(), expected, rel_tol=1e-8, abs_tol=1e-8)
    value.backward()
    assert torch.isfinite(anchors.grad).all() and torch.isfinite(candidates.grad).all()


@given(batch=batches(), margin=st.floats(0.01, 2), weight=st.floats(0, 5), data=st.data())
def test_the_pairwise_loss_is_its_formula(batch: dict[str, Any], margin: float, weight: float, data: Any) -> None:
    similarities = (batch["a"] @ batch["n"].T).requires_grad_()
    positive, negative = batch["mask"], ~batch["mask"]
    labels = 1 + data.draw(st.floats(0, 5)) * batch["p"][:, :1].abs().expand_as(similarities)
    means, variances = [], []
    for side in (positive, negative):
        some = [(labels[i, j].item(), similarities[i, j].item()) for i, j in side.nonzero().tolist()]
        total = sum(label for label, _ in some)
        means.append(sum(label * s for label, s in some) / total if some else None)
        variances.append(sum(label * (s - means[-1]) ** 2 for label, s in some) / total if some else 0.0)
    apart = 0.0 if None in means else max(0.0, margin - (means[0] - means[1]))
    value = pairwise_similarity_loss(similarities, positive, negative, labels, margin=margin, mean_weight=weight)
    assert math.isclose(value.item(), sum(variances) + weight * apart, rel_tol=1e-9, abs_tol=1e-9)
    value.backward()
    assert torch.isfinite(similarities.grad).all()


@given(batch=batches(), weights=st.lists(st.floats(0, 10), min_size=3, max_size=3), ids=st.data())
def test_the_total_is_equation_8(batch: dict[str, Any], weights: list[float], ids: Any) -> None:
    """Images a, texts p, drawn neighbors n and others: every term by a loop that masks by image_id."""
    size = len(batch["a"])
    numbers = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    own, drawn = ids.draw(numbers), ids.draw(numbers)
    has = [ids.draw(st.booleans()) for _ in range(size)]
    x, y, u, v = batch["a"], batch["p"], batch["n"], batch["n"].flip(0)

    def term(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, neighbors: bool) -> float:
        total = 0.0
        for i in range(size):
            exponents = [
                4
                * dot(
                    [s + t for s, t in zip(anchors[i].tolist(), positives[i].tolist(), strict=True)],
                    negatives[j].tolist(),
                )
                - 4 * dot(anchors[i].tolist(), positives[i].tolist())
                for j in range(size)
                if own[j] != own[i] and not (neighbors and (own[j] == drawn[i] or not has[i]))
            ]
            total += math.log1p(sum(map(math.exp, exponents)))
        return total / size

    terms = losses.retrieval_loss_terms(
        losses.angular_npairs_loss, x, y, torch.tensor(own), u, v, torch.tensor(drawn), torch.tensor(has)
    )
    expected = {
        "l_i2t": term(x, y, y, False),
        "l_sym": term(y, x, x, False),
        "l_img": term(x, u, x, True),
        "l_text": term(y, v, y, True),
    }
    for name, value in expected.items():
        assert math.isclose(terms[name].item(), value, rel_tol=1e-9, abs_tol=1e-9), name
    sym, img, text = weights
    total = losses.weighted_sum(terms, {"l_i2t": 1, "l_sym": sym, "l_img": img, "l_text": text})
    weighted = expected["l_i2t"] + sym * expected["l_sym"] + img * expected["l_img"] + text * expected["l_text"]
    assert math.isclose(total.item(), weighted, rel_tol=1e-9, abs_tol=1e-9)
