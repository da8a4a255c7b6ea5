"""What is kept on disk: journals, locks, atomic writes, and the readers of files that may be anything."""

import json
import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest

from conftest import said_in_time
from personality import store
from personality.store import (Journal, cache_folder, digest, json_lines, markdown, only_run, parse_json, read_text, read_toml,
                               to_line, write_atomically)
from personality.terminal import UserError

# ------------------------------------------------------------------------------------------------------------- journal


def test_a_journal_is_found_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.append({"key": "a", "n": 1}, {"key": "b", "n": 2})
    journal.append({"key": "a", "n": 3}, {"n": 4})
    for journal in (journal, Journal(path, {"seed": 1})):
        assert len(journal) == 4 and "a" in journal and "c" not in journal
        assert journal["a"] == {"key": "a", "n": 3}, "the last line of a key counts"
        assert journal["b"]["n"] == 2 and [line["n"] for line in journal] == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[0]) == {"personality-neurons": "answers", "seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"], "no lock is left"


@pytest.mark.parametrize("cut", (1, 5, 14))
@pytest.mark.parametrize("header", (None, {"seed": 1}))
def test_a_line_that_was_cut_off_goes(tmp_path, cut, header):
    path = tmp_path / "j.jsonl"
    Journal(path, header).append({"key": "a", "text": "é"}, {"key": "b", "text": "x" * 9})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(path, header)
    assert list(journal.number_of) == ["a"] and len(journal) == 1
    journal.append({"key": "b", "text": "x" * 9})
    assert path.read_bytes() == whole


def test_a_line_that_another_one_left_half_written_goes(tmp_path):
    """A process that died while two had the file open."""
    path = tmp_path / "j.jsonl"
    first, second = Journal(path), Journal(path)
    first.append({"key": "a"})
    with open(path, "ab") as file:
        file.write(b'{"key": "dead", "text": "' + b"x" * 70_000)
    second.append({"key": "b"})
    assert [line["key"] for line in Journal(path)] == ["a", "b"] and second["b"] == {"key": "b"} and first["a"] == {"key": "a"}


def test_who_comes_while_a_line_is_written_waits(tmp_path):
    """It once took the half of it that was there for what a killed run had left, and cut it off, with whatever had come behind."""
    path, lines, late = tmp_path / "j.jsonl", [{"key": name, "text": "x" * 70_000} for name in "abc"], []
    early = Journal(path)
    early.append(lines[0])
    with only_run(tmp_path / ".j.jsonl.lock"), open(path, "ab") as file:
        file.write(to_line(lines[1])[:40])
        file.flush()
        assert list(early) == lines[:1], "half of a line is none"
        comes = threading.Thread(target=lambda: late.append(Journal(path)))
        comes.start()
        comes.join(0.3)
        file.write(to_line(lines[1])[40:])
    comes.join()
    late[0].append(lines[2])
    assert list(late[0]) == list(Journal(path)) == lines and late[0]["c"] == lines[2]


def test_a_header_that_was_cut_off_is_written_anew(tmp_path):
    path = tmp_path / "scores.jsonl"
    Journal(path, {"seed": 1})
    whole = path.read_bytes()
    for size in (0, 7, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert len(Journal(path, {"seed": 1})) == 0 and path.read_bytes() == whole


@pytest.mark.parametrize("text", ("my own notes\n", '{"question": "precious, and no end of line"}',
                                  '{"text": "of another tool"}\n', "[1]\n", '{"personality-neurons": "other", "seed": 1}\n'))
def test_a_foreign_file_is_left_as_it_is(tmp_path, text):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(UserError, match="answers.jsonl: not a file of this program"):
        Journal(tmp_path / "answers.jsonl", {"seed": 1})
    assert (tmp_path / "answers.jsonl").read_text() == text


def test_another_header_says_both(tmp_path):
    Journal(tmp_path / "a.jsonl", {"seed": 1, "model": "m"}).append({"key": "a"})
    with pytest.raises(UserError, match="was made with {'seed': 1}, now it is {'seed': 2}: choose another --out"):
        Journal(tmp_path / "a.jsonl", {"seed": 2, "model": "m"})


def test_lines_are_checked(tmp_path):
    Journal(tmp_path / "a.jsonl", {}).append({"key": "a", "score": "high"})
    with pytest.raises(UserError, match="a.jsonl, line 2: not what this program writes"):
        Journal(tmp_path / "a.jsonl", {}, lambda line: isinstance(line.get("score"), float))


@pytest.mark.parametrize("header", (None, {"seed": 1}))
def test_cutting_forgets_what_comes_after(tmp_path, header):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, header)
    journal.append(*({"key": str(n)} for n in range(5)))
    journal.cut(2)
    assert len(journal) == 2 and "1" in journal and "2" not in journal
    journal.append({"key": "new"})
    assert [line["key"] for line in Journal(path, header)] == ["0", "1", "new"] and journal["new"] == {"key": "new"}
    journal.cut(0)
    assert len(Journal(path, header)) == 0


def test_a_journal_that_was_emptied_meanwhile_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append({"key": "a"}, {"key": "b"})
    os.truncate(path, 0)
    journal.append({"key": "c"})
    assert [line["key"] for line in Journal(path)] == ["c"] and b"\0" not in path.read_bytes()


def test_half_an_emoji_can_be_kept(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"key": "a", "text": "ah \ud83d!"}, {"key": "b", "text": "\u2028 line"})
    assert journal["a"]["text"] == "ah ?!" and journal["b"]["text"] == "\u2028 line" and len(Journal(tmp_path / "j.jsonl")) == 2


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"key": "a"})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            journal.append({"key": "b", "text": "x" * 100})
    assert "b" not in journal and [line["key"] for line in Journal(tmp_path / "j.jsonl")] == ["a"]
    journal.append({"key": "c"})
    assert [line["key"] for line in Journal(tmp_path / "j.jsonl")] == ["a", "c"]


@pytest.mark.parametrize("room", (0, 10, 5000, 40_000))
def test_what_a_full_disk_did_not_take_is_not_written_later(tmp_path, room):
    """A part of what is appended goes in, as on a disk that fills up; then there is room again."""
    path = tmp_path / "j.jsonl"
    journal, lines = Journal(path), [{"key": f"{k}", "text": "x" * 3000} for k in range(20)]
    journal.append({"key": "a"})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            journal.append(*lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and error.value.filename == str(path)
    journal.append(*lines)
    assert [line["key"] for line in Journal(path)] == ["a", *(line["key"] for line in lines)]


def test_threads_append(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")

    def write(k):
        for n in range(20):
            journal.append({"key": f"{k}.{n}", "n": n})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for journal in (journal, Journal(tmp_path / "j.jsonl")):
        assert len(journal) == 120
        assert all(journal[f"{k}.{n}"] == {"key": f"{k}.{n}", "n": n} for k in range(6) for n in range(20))


def write_lines(path, name):
    journal = Journal(path)
    for number in range(60):
        journal.append({"key": f"{name}.{number}", "text": name * number})
    assert all(journal[f"{name}.{number}"]["text"] == name * number for number in range(60))


def test_processes_append(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_lines, args=(tmp_path / "j.jsonl", name)) for name in "ab"]
    [process.start() for process in processes]
    [process.join() for process in processes]
    journal = Journal(tmp_path / "j.jsonl")
    assert [process.exitcode for process in processes] == [0, 0] and len(journal) == 120
    assert all(journal[f"{name}.{number}"]["text"] == name * number for name in "ab" for number in range(60))


# ---------------------------------------------------------------------------------------------------------------- locks


def test_one_run_at_a_time(tmp_path, capsys):
    lock, order = tmp_path / ".lock", []

    def second():
        with only_run(lock, "another run has it, this one waits"):
            order.append("second")

    with only_run(lock):
        with pytest.raises(UserError, match="another run is at it"), only_run(lock, "another run is at it", wait=False):
            pytest.fail("both have it")
        waiting = threading.Thread(target=second)
        waiting.start()
        assert said_in_time(capsys, "another run has it, this one waits")
        order.append("first")
    waiting.join()
    assert order == ["first", "second"] and not lock.exists()


def hold(lock, ready):
    with only_run(lock):
        ready.set()
        time.sleep(60)


def test_the_lock_of_a_run_that_died_is_free(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / ".lock", ready))
    process.start()
    ready.wait(10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with only_run(tmp_path / ".lock", "held", wait=False):
        pass


# -------------------------------------------------------------------------------------------------------------- writing


def test_write_atomically_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError) as error:
        write_atomically(path, b"new")
    assert error.value.filename == str(path) and path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("data", ("é\n", "é\n".encode(), ["é".encode(), b"\n"]))
def test_texts_bytes_and_parts_are_written(tmp_path, data):
    write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").read_text() == "é\n"


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder"):
        cache_folder("models")


# -------------------------------------------------------------------------------------------------------------- reading


def test_lines_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\\u00e9\\ud83d\\ude00"}\n')
    assert list(json_lines(path)) == [(1, {"a": 1}), (4, {"a": "é😀"})]


@pytest.mark.parametrize("line, reason", ((b"{broken", "not JSON"), (b"[1]", "expected a JSON object, got list"),
                                          (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"),
                                          (b'{"a": "\\ud83d"}', "not JSON")))
def test_wrong_lines_name_file_and_line(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {reason}"):
        list(json_lines(tmp_path / "a.jsonl"))


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "deep").write_text("a = " + "[" * 50_000)
    with pytest.raises(UserError, match="--flag .*nowhere: No such file"):
        read_text(tmp_path / "nowhere", "--flag ")
    with pytest.raises(UserError, match="bytes: not UTF-8 text"):
        read_text(tmp_path / "bytes")
    with pytest.raises(UserError, match="Is a directory"):
        list(json_lines(tmp_path))
    with pytest.raises(UserError, match="deep: not TOML"):
        read_toml(tmp_path / "deep")
    with pytest.raises(UserError, match="here: not JSON"):
        parse_json("[" * 100_000, "here")


def test_digests_tell_values_apart():
    assert digest(1, "a") == digest(1, "a") != digest("a", 1) and len(digest()) == 16
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_table_holds_any_text():
    assert markdown(["a", "b"], [["x|y", "two\nlines"]]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"


def test_no_home_folder(monkeypatch):
    monkeypatch.setattr(store, "CACHE", store.Path("~/.cache/personality-neurons"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        cache_folder("op")


def test_a_path_with_a_nul():
    with pytest.raises(UserError, match="--profile .*null"):
        read_text("a\0b", "--profile ")


def test_a_key_stands_once_in_an_object():
    assert parse_json('{"a": {"b": 1}, "b": 2}', "x") == {"a": {"b": 1}, "b": 2}
    with pytest.raises(UserError, match="x: not JSON: 'b' stands twice"):
        parse_json('{"a": {"b": 1, "b": 2}}', "x")
