import io
import json
import math

import pytest

from dcomp import DcompError
from dcomp.recipes import console

HOSTILE = "[bold]cat[/bold] \x1b[2J\x07 \u202eevil \ud800 :smile:"


@pytest.fixture(autouse=True)
def fresh_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    console._stdout.cache_clear()
    console._stderr.cache_clear()


class Lines:
    """Receives progress lines; its clock is moved by hand."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.progress = console.PlainProgress(self.lines.append, clock=lambda: self.now)


def test_plain_progress_prints_the_start_every_half_minute_and_the_end() -> None:
    seen = Lines()
    for done in range(101):
        seen.now = done * 1.0
        seen.progress("pictures", done, 100)
    assert [line.split(",")[0] for line in seen.lines] == [f"pictures: {done}/100" for done in (0, 30, 60, 90, 100)]
    assert "about 1:10 left" in seen.lines[1]
    assert "left" not in seen.lines[-1]


def test_time_left_of_resumed_work_counts_only_what_was_done_now() -> None:
    seen = Lines()
    seen.progress("pictures", 80, 100)
    seen.now = 40.0
    seen.progress("pictures", 90, 100)
    assert "about 0:40 left" in seen.lines[1]


def test_each_piece_of_work_has_its_own_start_and_the_end_is_told_once() -> None:
    seen = Lines()
    for text, done in (("a", 0), ("a", 2), ("a", 2), ("b", 0), ("b", 2), ("b", 0), ("b", 2)):
        seen.progress(text, done, 2)
    assert [line.split(",")[0] for line in seen.lines] == ["a: 0/2", "a: 2/2", "b: 0/2", "b: 2/2", "b: 0/2", "b: 2/2"]


def test_progress_without_a_terminal_is_plain_text_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as progress:
        progress(HOSTILE, 0, 0)
        progress("pictures", 3, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "[bold]cat[/bold]" in err
    assert "pictures: 3/3" in err


@pytest.mark.parametrize("variable", ["CI", "NO_COLOR"])
def test_bars_need_a_terminal_and_no_objection(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    assert console.is_interactive()
    monkeypatch.setenv(variable, "1")
    assert not console.is_interactive()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_survive_hostile_texts_unknown_totals_and_repeated_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with console.progress() as progress:
        for done, total in ((0, 0), (1, 4), (4, 4), (0, 4), (4, 4)):
            progress("[red]\x07weights", done, total)
    assert "[red]\\x07weights" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_control_characters_and_lone_surrogates_become_visible_and_printable() -> None:
    text = console.visible(HOSTILE)
    assert text.isprintable()
    assert text.encode()
    assert "\\x1b[2J\\x07" in text
    assert "\\u202e" in text
    assert console.visible("a\nb", keep="\n") == "a\nb"
    assert console.visible("ein Bär, 熊 🐻") == "ein Bär, 熊 🐻"


def test_error_shows_problem_place_and_remedy_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(DcompError("The file [/red] is bad", where="a/[b].txt", remedy="Give another [one]."))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.strip() for line in err.splitlines()] == [
        "Error: The file [/red] is bad",
        "in: a/[b].txt",
        "do: Give another [one].",
    ]


def test_tables_show_markup_as_text_and_go_where_they_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("Layers", ("name", "bytes"), [("[b]x[/b]", 12345), ("y", None)], right=(1,))
    console.print_facts(
        "Facts", {"peak_bytes": 2_500_000, "nested": {"rows": [{"a": True}, {"a": 0.12345}]}}, on="stderr"
    )
    out, err = capsys.readouterr()
    assert "[b]x[/b]  12,345" in out
    assert "2.5 MB" in err
    assert "nested · rows 0 · a  yes" in err
    assert "0.1235" in err


def test_long_names_are_not_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0" * 3
    console.print_table("", ("name",), [(name,)])
    console.say(name)
    out, err = capsys.readouterr()
    assert name in out.replace("\n", "")
    assert name in err


def test_records_become_columns_in_order_of_appearance(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_records("Kernels", [{"op": "linear_a8", "backend": "cpu"}, {"op": "conv2d_a8", "reason": "no VNNI"}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["op", "backend", "reason"]
    assert lines[3].split() == ["conv2d_a8", "no", "VNNI"]


def test_json_on_stdout_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"path": "\udcff", "prompt": "熊", "value": None}
    console.print_json(data)
    assert json.loads(capsys.readouterr().out) == data
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"value": math.nan})


def test_numbers_bytes_and_times_read_well() -> None:
    assert [console.bytes_text(n) for n in (None, 0, 999, 1000, 12_640_000, 7.5e9, 3e15)] == [
        "-", "0 B", "999 B", "1 kB", "12.6 MB", "7.5 GB", "3,000 TB",
    ]  # fmt: skip
    assert [console.time_text(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
    assert [console.value_text(v) for v in (None, True, 7, 12345, 0.123456, 123456.7, "x")] == [
        "-", "yes", "7", "12,345", "0.1235", "123,457", "x",
    ]  # fmt: skip
