"""Documents, numbers and quotes of others: bounded, and safe to print."""

import ctypes
import json
import math
import struct
import sys
from types import SimpleNamespace

import pytest
import torch

from efficient_vdit_core.limits import memory
from efficient_vdit_core.limits.documents import parse_json, parse_toml, read_text
from efficient_vdit_core.limits.numbers import number, whole
from efficient_vdit_core.limits.quote import MESSAGE, message, named, quoted, reason
from efficient_vdit_core.limits.texts import MAX_PROMPT, checked_prompt


def short(value):
    """An id: pytest would write the numbers out."""
    return quoted(value, 20)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", "'a b'"),
        ("\x1b[31mred\x07", r"'\x1b[31mred\x07'"),
        ("\ud800", r"'\ud800'"),
        ("\u202eevil", r"'\u202eevil'"),
        (10**5000, "10^5000"),
        (-(10**5000), "-10^5000"),
        ([[[[1]]]], "[[[[...]]]]"),
        (None, "None"),
    ],
    ids=short,
)
def test_a_quoted_value_can_be_printed(value, shown):
    assert quoted(value) == shown


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\x1b" * 10**6, [0] * 10**6, {str(i): i for i in range(10**5)}, 10**20000], ids=short
)
def test_a_quoted_value_is_short(value):
    assert len(quoted(value)) <= 60 and quoted(value).isprintable()


def test_messages_and_names_are_short_and_keep_their_end():
    text = message("Begin \x1b " + "x" * 10**6 + " do this.")
    assert len(text) <= MESSAGE and text.startswith("Begin \\x1b") and text.endswith("do this.") and text.isprintable()
    assert named("a\nb" + "c" * 1000 + ".json").endswith(".json") and "\n" not in named("a\nb")
    assert reason(RuntimeError("\n first line. \nsecond")) == "first line" and reason(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    "parse", [lambda text: parse_json(text, "It", advice="Mend it."), lambda text: parse_toml(text, "It")]
)
@pytest.mark.parametrize(
    "text", ["[" * 10**5, "x = " + "[" * 500 + "]" * 500, "[" * 50 + "]" * 50, "1" * 5000, "\ud800", "x=1e"]
)
def test_documents_that_break_parsers_are_refused(parse, text):
    with pytest.raises(ValueError, match="^It ") as error:
        parse(text)
    assert type(error.value) is ValueError and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "[1e400]", "{" + '"a":1,' * 10, '"' + "x" * 2**21 + '"', "[" + "1," * 300_000 + "1]"]
)
def test_json_beyond_its_bounds_is_refused(text):
    with pytest.raises(ValueError, match=r"^It .*Mend it\.$|^It is larger"):
        parse_json(text, "It", advice="Mend it.")


def test_documents_within_their_bounds_are_read():
    value = {"a": [1, 2.5, None, {"b": "\x1b"}]}
    assert parse_json(json.dumps(value), "It", advice="") == value
    assert parse_toml("a.b.c = [1, 2]\nd = inf", "It") == {"a": {"b": {"c": [1, 2]}}, "d": math.inf}


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff", "no UTF-8"), (b"x" * 101, "larger than 100"), (None, "is not there")]
)
def test_files_that_are_no_text(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"^It .*{said}"):
        read_text(tmp_path / "a", "It", limit=100)


def test_the_mark_that_windows_puts_before_a_text_is_none_of_it(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert parse_json(read_text(tmp_path / "a", "It"), "It", advice="") == {"a": 1}


@pytest.mark.parametrize("value", [0, 11, True, 1.0, "1", None, 10**5000, math.nan], ids=short)
def test_numbers_that_are_not_whole_or_out_of_range(value):
    with pytest.raises(ValueError, match="^steps is .*, expected a whole number from 1 to 10"):
        whole(value, "steps", 1, 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1, True, "1", None, 10**400], ids=short)
def test_numbers_that_are_not_finite_or_out_of_range(value):
    with pytest.raises(ValueError, match="^gamma is .*, expected a number from 0 to 1"):
        number(value, "gamma", 0, 1)


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": 3 * 2**30)
    memory.check_memory(2**30, "The clip", "Cut it.")
    with pytest.raises(ValueError, match=r"The clip takes about 50 GiB of memory, 3\.0 GiB are free\. Cut it\."):
        memory.check_memory(50 * 2**30, "The clip", "Cut it.")
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": None)
    memory.check_memory(2**60, "The clip", "Cut it.")  # where the system does not tell, nothing is refused


def test_a_system_tells_its_free_memory():
    assert 2**20 < (memory.free_bytes() or 2**30) < 2**50


@pytest.fixture
def no_linux(monkeypatch, tmp_path):
    """A system without /proc and control groups, and without sysconf."""
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.strip("/"))
    monkeypatch.delattr(memory.os, "sysconf")


def test_psutil_tells_what_is_free_where_linux_does_not(no_linux, monkeypatch):
    told = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=3 * 2**30, total=2**36))
    monkeypatch.setitem(sys.modules, "psutil", told)
    assert memory.free_bytes() == 3 * 2**30
    with pytest.raises(ValueError, match=r"takes about 50 GiB of memory, 3\.0 GiB are free"):
        memory.check_memory(50 * 2**30, "The clip", "Cut it.")


def test_a_mac_says_what_is_free_and_not_what_it_has(no_linux, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**24}.get, raising=False)
    told = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
    monkeypatch.setitem(sys.modules, "psutil", told)
    assert memory.free_bytes() == 0
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.free_bytes() == 2**36, "without psutil"


@pytest.mark.parametrize(("answers", "free"), [(1, 5 * 2**30), (0, None)])
def test_windows_tells_what_is_free_without_psutil(no_linux, monkeypatch, answers, free):
    def status(pointer):
        about = pointer._obj
        assert about.dwLength == ctypes.sizeof(about) == 64
        # MEMORYSTATUSEX: two numbers of four bytes, then all of main memory and what is free of it
        struct.pack_into("<IIQQ", about, 0, 64, 50, 2**36, 5 * 2**30)
        return answers

    monkeypatch.setitem(sys.modules, "psutil", None)
    windll = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=status))
    monkeypatch.setattr(ctypes, "windll", windll, raising=False)
    assert memory.free_bytes() == free


def test_a_broken_psutil_is_none(no_linux, monkeypatch):
    def refuse():
        raise OSError("counters are off")

    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=refuse))
    assert memory.free_bytes() is None


def test_a_container_bounds_what_the_machine_has_free(monkeypatch, tmp_path):
    """Linux asks neither psutil nor sysconf, which know nothing of control groups."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("memory.max", "1000"), ("memory.current", "400"), ("memory.stat", "inactive_file 50")):
        (group / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.strip("/"))
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.free_bytes() == 650


def test_prompts_are_bounded_and_well_formed(caplog):
    assert checked_prompt("猫 🐈") == "猫 🐈"
    assert len(checked_prompt("a" * 10**6)) == MAX_PROMPT and "cut off" in caplog.text
    with pytest.raises(ValueError, match=r"half a surrogate pair \(U\+D800\) at character 3"):
        checked_prompt("ab\ud800")


def test_what_pytorch_holds_and_nobody_uses_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    stats = {"reserved_bytes.all.current": 6 * 2**30, "active_bytes.all.current": 2 * 2**30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert memory.free_bytes("cuda:0") == 5 * 2**30
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})  # nothing was ever taken there
    assert memory.free_bytes("cuda:0") == 2**30


@pytest.mark.parametrize("part", ["a", '"a b"', "'a.b'", "a "])
@pytest.mark.parametrize("line", ["{} = 1", "x = 1\n[{}]", "x = {{ y = '...', {} = 2 }}"])
def test_a_key_of_many_parts_is_refused_before_it_is_parsed(monkeypatch, part, line):
    """The parser takes the square of them: 64 kB took half a minute."""
    tomllib, asked = pytest.importorskip("tomllib"), []
    monkeypatch.setattr(tomllib, "loads", lambda text: asked.append(text) or {})
    with pytest.raises(ValueError, match="It is nested deeper than 32 levels"):
        parse_toml(line.format(".".join([part] * 40)), "It")
    assert asked == []


def test_points_that_are_in_no_key_are_no_levels():
    texts = [".".join("a" * 99), "1." * 99, 'a " b.' * 40, "...'''" * 40]
    lines = [f"a{i} = {json.dumps(text)}" for i, text in enumerate(texts)]
    lines += [f"b = [{', '.join(['1.5'] * 99)}]", f"# {'a.' * 99}", f"d = '{'a.' * 99}'"]
    lines += [f"c = {quotes}\n{'a.' * 99}\n{quotes}" for quotes in ('"""', "'''")]
    lines[-1] = "e" + lines[-1][1:]
    assert [parse_toml("\n".join(lines), "It")[f"a{i}"] for i in range(4)] == texts
