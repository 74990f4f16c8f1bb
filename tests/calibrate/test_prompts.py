import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcomp import DcompError
from dcomp.calibrate.default_prompts import DEFAULT_PROMPTS
from dcomp.calibrate.prompts import MAX_PROMPT_CHARS, PromptError, read_prompts

PROMPTS = ["a cat", "a dog, running", 'a "quoted" bird', "Ünïcode 猫"]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"prompts{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join([PROMPTS[0], "  ", *PROMPTS[1:]]) + "\n", encoding="utf-8")
    elif suffix == ".csv":
        quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS]
        path.write_text("id,caption\n" + "".join(f"{i},{q}\n" for i, q in enumerate(quoted)), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(PROMPTS))
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"prompt": prompt, "n": 1}) for prompt in PROMPTS))
    else:
        table = pyarrow.table({"image": [b"\0"] * 4, "caption": PROMPTS})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_prompts_in_order(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path, suffix)
    assert read_prompts(path, 4, "text") == PROMPTS
    assert read_prompts(str(path), 2, "text") == PROMPTS[:2]


def test_fewer_prompts_than_asked_for_are_returned_as_they_are(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, ".txt"), 100, "text") == PROMPTS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompts": ["a", "b"], "count": 2}', ["a", "b"]),
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('[{"odd": "a"}]', ["a"]),
        ("[1, 207]", ["1", "207"]),
    ],
)
def test_json_may_be_a_list_or_a_table(content: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    assert read_prompts(path, 9, "text") == expected


def test_a_named_column_wins(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,other\na,x\nb,y\n")
    assert read_prompts(path, 9, "text", "other") == ["x", "y"]
    with pytest.raises(PromptError, match=r"no column 'nope'.*prompt, other"):
        read_prompts(path, 9, "text", "nope")


def test_an_unclear_column_is_asked_for_with_the_names_present(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"one": ["a"], "two": ["b"], "picture": [b"c"]}), path)
    with pytest.raises(PromptError, match="one, two"):
        read_prompts(path, 9, "text")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.txt", b"", "not one prompt"),
        ("p.txt", b"\n  \n", "not one prompt"),
        ("p.txt", b"\x89PNG\r\n\x1a\n", "binary"),
        ("p.txt", b"a\0b", "binary"),
        ("p.txt", "a café".encode("latin-1"), "not UTF-8"),
        ("p.txt", b"x" * (MAX_PROMPT_CHARS + 1), "more than the limit"),
        ("p.docx", b"a", "ends in '.docx'"),
        ("p", b"a", "ends in 'nothing'"),
        ("p.json", b"{", "not valid JSON"),
        ("p.json", b"[" * 100_000, "not valid JSON"),
        ("p.json", b'"a"', "not a list"),
        ("p.json", b"[[1]]", "is no text but list"),
        ("p.json", b"", "not one prompt"),
        ("p.jsonl", b'{"prompt": "a"}\noops', "not valid JSON"),
        ("p.csv", b'prompt\n"a', "not valid CSV"),
        ("p.csv", b"", "which column"),
        ("p.parquet", b"PAR1 no parquet PAR1", "not a readable parquet"),
        ("p.parquet", b"", "not a readable parquet"),
    ],
)
def test_bad_files_are_refused_by_name(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=problem) as error:
        read_prompts(path, 4, "text")
    assert error.value.exit_code == 2
    assert str(path) in str(error.value)


def test_a_file_of_ten_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse: takes no room
    with pytest.raises(PromptError, match="10737418240 bytes"):
        read_prompts(path, 4, "text")


def test_a_huge_text_column_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    table = pyarrow.table({"prompt": ["x" * (1 << 20) + str(i) for i in range(70)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(PromptError, match="in a row group, more than the limit"):
        read_prompts(path, 4, "text")


@pytest.mark.parametrize("source", ["nowhere.txt", "/no/where", "./nowhere", "a/b/c"])
def test_a_missing_file_is_not_looked_for_elsewhere(source: str) -> None:
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(source, 4, "text")


def test_a_local_data_set_is_read(tmp_path: Path) -> None:
    write(tmp_path, ".parquet").rename(tmp_path / "train.parquet")
    assert read_prompts(tmp_path, 3, "text", "caption") == PROMPTS[:3]


def test_default_prompts_are_many_short_and_distinct() -> None:
    assert len(DEFAULT_PROMPTS) == len(set(DEFAULT_PROMPTS)) == 64
    assert all(5 < len(prompt) < 60 for prompt in DEFAULT_PROMPTS)
    assert read_prompts(None, 5, "text") == list(DEFAULT_PROMPTS[:5])


def test_the_model_folder_brings_its_own_defaults(tmp_path: Path) -> None:
    write(tmp_path, ".txt")
    assert read_prompts(None, 2, "text", model=tmp_path) == PROMPTS[:2]
    assert read_prompts(None, 2, "text", model=tmp_path / "elsewhere") == list(DEFAULT_PROMPTS[:2])


@given(count=st.integers(1, 300), classes=st.lists(st.integers(0, 1000), min_size=1, max_size=200, unique=True))
def test_default_classes_are_known_and_spread(count: int, classes: list[int]) -> None:
    ids = [int(text) for text in read_prompts(None, count, "class", classes=classes)]
    assert len(ids) == count
    assert set(ids) <= set(classes)
    assert max(map(ids.count, classes)) - min(map(ids.count, classes)) <= 1


def test_unconditional_models_get_empty_prompts_and_take_no_source(tmp_path: Path) -> None:
    assert read_prompts(None, 3, "unconditional") == ["", "", ""]
    with pytest.raises(PromptError, match="takes no prompts"):
        read_prompts(write(tmp_path, ".txt"), 3, "unconditional")


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".parquet"]))
def test_random_bytes_give_prompts_or_an_error_of_ours(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"random{suffix}"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path, 4, "text")
    except DcompError:
        return
    assert 1 <= len(prompts) <= 4
    assert all(prompt.strip() for prompt in prompts)
