"""Questions, personas, and the answers to them: the built-in bench, PersonalityBench's layout, the hub, files of answers."""

import json
import random
from collections import Counter

import datasets
import pyarrow
import pytest

from conftest import lines_of, save_bench
from personality import POLES, TRAITS, Bench, UserError, load_bench
from personality.grid import character_cells, described, grid, talks
from personality.judges import judge_personas
from personality.questions import adjectives, all_facets, built_in_bench, facets, read_answers, search_items, situation_of

# -------------------------------------------------------------------------------------------------- the built-in bench


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_questions(trait):
    bench = built_in_bench()
    search, test = bench.search[trait], bench.test[trait]
    assert len(set(search) | set(test)) >= 240 and len(search) + len(test) == len(set(search) | set(test))
    assert len(test) >= 40
    for question in search + test:
        assert question.endswith("?") and question[0].isupper() and 20 < len(question) < 200 and question == question.strip()
    situations = [{question.split(". ")[0] for question in part} for part in (search, test)]
    assert not situations[0] & situations[1], "a test question is asked in a situation that was searched with"


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize(("split", "number"), (("test", 16), ("validation", 8)))
def test_test_and_validation_are_of_many_situations_with_three_questions_each(trait, split, number):
    """What the answers in one situation have in common is one piece of luck, and so it is with facets and sentences: as many as may
    be, of any first few."""
    asked = built_in_bench().questions(trait, split, 99)
    where, sentences = zip(*((situation_of(question), question.split(". ", 1)[1]) for question in asked))
    facet_of = {sentence: facet["name"] for facet in facets(trait) for sentence in facet["questions"]}
    of_facets = [facet_of[sentence] for sentence in sentences]
    assert list(Counter(where).values()) == [3] * number and list(Counter(sentences).values()) == [number // 4] * 12
    assert len(set(where[:number])) == number, "first each situation once"
    for few in range(6, len(asked), 6):
        assert set(Counter(of_facets[:few]).values()) == {few // 6}, "every six ask for all facets"
    together = [{k for k, of in enumerate(where) if of == situation} for situation in dict.fromkeys(where)]
    assert all(len({of_facets[k] for k in places}) == 3 for places in together)
    assert len({frozenset(sentences[k] for k in places) for places in together}) > number // 2, "situations aren't tied to sentences"


def test_search_test_and_validation_share_no_situation():
    bench = built_in_bench()
    of = [{situation_of(question) for trait in TRAITS for question in bench.questions(trait, split, 999)}
          for split in ("search", "test", "validation")]
    assert [len(situations) for situations in of] == [18, 16, 8] and len(set.union(*of)) == 42


def test_turns_of_conversations_ask_for_every_facet():
    """Else the first turns and the last ones would be about other facets, and not just later. No situation comes twice."""
    for trait in TRAITS:
        whole = talks(built_in_bench(), [trait], ["unedited"], {}, 6, 36, 0)
        facet_of = {sentence: facet["name"] for facet in facets(trait) for sentence in facet["questions"]}
        for turn in range(6):
            assert len({facet_of[talk[turn]["question"].split(". ", 1)[1]] for talk in whole}) == 6
        assert len(whole) == 6 and all(len({situation_of(cell["question"]) for cell in talk}) == 6 for talk in whole)


def test_questions_of_another_bench_are_their_own_situations():
    assert situation_of("You join a bus tour through the mountains. What? And why?") == "You join a bus tour through the mountains."
    for question in ("You join a club. What?", "What?", "You join a bus tour through the mountains", "You join a bus tour"):
        assert situation_of(question) == question


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_personas(trait):
    bench = built_in_bench()
    high, low = (bench.personas[trait][pole] for pole in POLES)
    assert len(set(high)) >= 16 and len(set(low)) >= 16 and not set(high) & set(low)
    for pole in POLES:
        search, judge = (bench.personas_for(use, trait, pole) for use in ("search", "judge"))
        assert not set(search) & set(judge) and set(search) | set(judge) == set(bench.personas[trait][pole])
        assert len(judge) >= 4


@pytest.mark.parametrize("trait", TRAITS)
def test_judges_ask_for_every_facet_in_words_that_nothing_was_made_with(trait):
    bench = built_in_bench()
    said = lambda texts: {sentence for text in texts for sentence in text.split(". ") if not sentence.startswith("Speak")}  # noqa: E731
    for pole, asked in zip(POLES, (judge_personas(bench, trait)[:2], judge_personas(bench, trait)[2:]), strict=True):
        searched = said(bench.personas_for("search", trait, pole))
        assert searched == {f"You {facet[pole]}" for facet in facets(trait)}
        assert said(asked) == {f"You {facet[f'judge_{pole}']}" for facet in facets(trait)}, "a facet is left out, or stands twice"
        assert len(said(asked)) == 6 == sum(len(said([text])) for text in asked)
        assert not searched & said(bench.personas_for("judge", trait, pole))


def test_nothing_names_its_trait():
    bench = built_in_bench()
    names = (("openness", "open-minded", "open to"), ("conscientious",), ("extraver", "extrover", "introver"), ("agreeabl",),
             ("neurotic",))
    for trait, stems in zip(TRAITS, names, strict=True):
        texts = bench.search[trait] + bench.test[trait] + bench.personas[trait]["high"] + bench.personas[trait]["low"]
        assert not [text for text in texts for stem in stems if stem in text.lower()]


def test_built_in_bench_is_the_same_every_time():
    assert built_in_bench() == built_in_bench()


def test_each_trait_has_six_facets():
    """In the order of the traits, which a bench's cells follow."""
    assert [row["trait"] for row in all_facets()] == [trait for trait in TRAITS for _ in range(6)]
    assert len({row["name"] for row in all_facets()}) == 30


# ---------------------------------------------------------------------------------------------------- a bench in files


def test_load_bench(tmp_path):
    bench = load_bench(save_bench(tmp_path / "bench"))
    for trait in TRAITS:
        name = trait.capitalize()
        for use in ("search", "test"):
            written = lines_of(tmp_path / "bench" / use / f"{name}.json")
            assert sorted(getattr(bench, use)[trait]) == sorted(line["question"] for line in written)
        described = lines_of(tmp_path / "bench" / "description.json")
        assert bench.personas[trait] == {"high": [line[name] for line in described],
                                         "low": [line[f"{name}_reversed"] for line in described]}


def test_the_first_few_questions_of_a_bench_are_of_all_kinds(tmp_path):
    """Also where its files go facet by facet; always the same ones, whatever path leads there."""
    save_bench(tmp_path / "bench")
    lines = [{"question": f"facet {facet}, number {k}?"} for facet in range(6) for k in range(40)]
    for use in ("search", "test"):
        (tmp_path / "bench" / use / "Openness.json").write_text("".join(json.dumps(line) + " \n" for line in lines))
    bench, again = load_bench(str(tmp_path / "bench")), load_bench(f"{tmp_path}/./bench/")
    assert bench == again and bench.name == str(tmp_path / "bench")
    for split in ("search", "test", "validation"):
        of_facets = Counter(question[:7] for question in bench.questions("openness", split, 36))
        assert len(of_facets) == 6 and max(of_facets.values()) < 14
    assert bench.search["openness"] != bench.test["openness"]


def test_a_question_or_persona_that_stands_twice_is_one(tmp_path, capsys):
    """With a space behind it, too: else it could be searched and tested with, or be the judge's as well."""
    save_bench(tmp_path, personas=5)
    described, test = tmp_path / "description.json", tmp_path / "test" / "Openness.json"
    described.write_text(described.read_text() * 4)
    test.write_text(json.dumps({"question": lines_of(tmp_path / "search" / "Openness.json")[0]["question"] + " "}) + "\n" + test.read_text())
    bench = load_bench(str(tmp_path))
    assert "1 test questions of openness are search questions as well" in capsys.readouterr().err
    search, judge = (bench.personas_for(use, "openness", "high") for use in ("search", "judge"))
    assert len(search) == 4 and len(judge) == 1 and not set(search) & set(judge)
    described.write_text("".join(described.read_text().splitlines(True)[:3]) * 4)
    with pytest.raises(UserError, match="at least 4 lines .*got 3"):
        load_bench(str(tmp_path))


@pytest.mark.parametrize("file, text, pattern", (
    ("search/Openness.json", '{"question": "a ?"}\n{"question": "b ?"}\n{"question": \n', r"search/Openness.json, line 3"),
    ("search/Openness.json", '{"question": "a ?"}\n["b ?"]\n', r"search/Openness.json, line 2: .*object, got list"),
    ("test/Neuroticism.json", '{"question": "a ?"}\n\n{"text": "b ?"}\n', r"test/Neuroticism.json, line 3: .*text"),
    ("test/Neuroticism.json", '{"question": 3}\n', r"test/Neuroticism.json, line 1"),
    ("search/Extraversion.json", "", r"search/Extraversion.json"),
    ("test/Extraversion.json", None, r"test/Extraversion.json.*No such file"),
    ("description.json", None, r"description.json.*No such file"),
    ("description.json", "".join(f'{{"Openness": "a{k}"}}\n' for k in range(9)), r"description.json.*Openness_reversed"),
    ("description.json", b"\xff\xfe", r"description.json")))
def test_load_bench_errors_name_file_and_line(tmp_path, file, text, pattern):
    path = save_bench(tmp_path / "bench") / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=pattern):
        load_bench(tmp_path / "bench")


def test_options_and_scales_are_skipped(tmp_path, capsys):
    folder = save_bench(tmp_path / "bench")
    path = folder / "search" / "Openness.json"
    before = load_bench(str(folder)).search["openness"]
    more = [{"question": "Pick one:\nA. stay\nB. go\nWhich?", "id": 1}, {"question": "Which?", "options": ["a", "b"]},
            {"question": "How accurately does this describe you: I like parties?"},
            {"question": "I like parties. Agree or disagree?"}]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in more))
    assert load_bench(str(folder)).search["openness"] == before
    assert "4 items with options or a scale were skipped" in capsys.readouterr().err
    path.write_text("".join(json.dumps(line) + "\n" for line in more))
    with pytest.raises(UserError, match="Openness.json: no open question"):
        load_bench(str(folder))


def test_a_bench_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    save_bench(tmp_path / "bench")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.append((name, options)) or str(tmp_path / "bench"))
    bench = load_bench("someone/PersonalityBench")
    assert bench.name == "someone/PersonalityBench" and bench.search == load_bench(str(tmp_path / "bench")).search
    assert asked[0][1]["repo_type"] == "dataset"


def test_a_bench_that_is_nowhere():
    with pytest.raises(UserError, match="no-such/bench: neither a directory nor a dataset of the hub in reach"):
        load_bench("no-such/bench")


# ----------------------------------------------------------------------------------------------------- files of answers

GOOD = {"trait": "extraversion", "pole": "low", "persona": "w9", "question": "w10 ?", "answer": "w11"}


def test_answers_that_are_read_are_those_in_the_file(made):
    lines = lines_of(made / "extraversion.answers.jsonl")
    table, _ = read_answers(str(made / "extraversion.answers.jsonl"), "extraversion")
    assert len(table) == len(lines) > 7
    some = table.select(range(3, 7)).to_list()
    assert some == [{name: line[name] for name in ("pole", "persona", "question", "answer", "ids")} for line in lines[3:7]]


def test_only_the_traits_own_answers_count(tmp_path):
    """And only they are in the digest, whatever the case of the trait; ids can be missing."""
    path = tmp_path / "given.jsonl"
    path.write_text(json.dumps({**GOOD, "trait": "Extraversion"}) + "\n")
    alone, content = read_answers(str(path), "extraversion")
    assert alone.to_list() == [{**{name: GOOD[name] for name in ("pole", "persona", "question", "answer")}, "ids": []}]
    path.write_text(path.read_text() + json.dumps({**GOOD, "trait": "openness"}) + "\n")
    assert read_answers(str(path), "extraversion")[1] == content and len(read_answers(str(path), "extraversion")[0]) == 1
    path.write_text(path.read_text() + json.dumps({**GOOD, "answer": "w12"}) + "\n")
    assert read_answers(str(path), "extraversion")[1] != content and len(read_answers(str(path), "extraversion")[0]) == 2


def test_reading_answers_does_not_hold_their_text(tmp_path):
    """8 MB of answers are mapped from the disk: next to nothing of them is in memory, also while one is looked at."""
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "answer": f"w{k} " * 2000, "ids": [k]}) + "\n" for k in range(1000, 2000)))
    before = pyarrow.total_allocated_bytes()
    table, _ = read_answers(str(path), "extraversion")
    assert table.select([998]).to_list()[0]["ids"] == [1998] and table.cache_files
    assert pyarrow.total_allocated_bytes() - before < path.stat().st_size / 20


@pytest.mark.parametrize("line, pattern", (
    (json.dumps({**GOOD, "pole": "up"}), "line 2.*'up'"),
    (json.dumps({name: text for name, text in GOOD.items() if name != "answer"}), "line 2.*answer"),
    (json.dumps({**GOOD, "ids": [5, "6"]}), "line 2.*ids"), (json.dumps({**GOOD, "ids": 5}), "line 2.*ids"),
    (json.dumps({**GOOD, "ids": [1 << 70]}), "line 2.*ids"),
    ("nonsense", "line 2"), ("[]", "line 2.*object")))
def test_wrong_lines_of_answers_are_named(tmp_path, line, pattern):
    (tmp_path / "given.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"given.jsonl.*{pattern}"):
        read_answers(str(tmp_path / "given.jsonl"), "extraversion")


def test_a_file_without_answers_for_a_trait_says_what_it_has(tmp_path):
    (tmp_path / "given.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(UserError, match="no answers for openness.*extraversion"):
        read_answers(str(tmp_path / "given.jsonl"), "openness")


def test_no_room_to_unpack_answers(monkeypatch, tmp_path):
    def full(*args, **options):
        raise datasets.exceptions.DatasetGenerationError("x") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_generator", full)
    line = {"trait": "openness", "pole": "high", "persona": "a", "question": "b", "answer": "c"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="can't be unpacked in .*No space left.*TMPDIR"):
        read_answers(tmp_path / "answers.jsonl", "openness")


def test_personas_are_drawn_by_the_seed():
    """In identification, and where a persona stands in the prompt; a character's description by its question as well."""
    bench = built_in_bench()
    first, again, other = (search_items(bench, "openness", 20, seed) for seed in (0, 0, 1))
    assert first == again and sum(a != b for a, b in zip(first, other)) > 20
    asked = bench.questions("openness", "test", 20)
    first, again, other = (grid(bench, "openness", ["persona"], {}, asked, seed) for seed in (0, 0, 1))
    assert first == again and sum(a != b for a, b in zip(first, other)) > 20
    cells = character_cells(bench, [(1.0, 0, 0, 0, 0)], {}, asked, 0)
    assert len({cell["persona"] for cell in cells if cell["method"] == "described"}) > 5


@pytest.mark.parametrize("alpha, degree", ((0.3, "slightly"), (0.7, "quite"), (-1.2, "very")))
def test_a_description_says_how_marked_a_trait_is(alpha, degree):
    said = described(built_in_bench(), (alpha, 0, 0, 0, 0), random.Random(0))
    assert said.startswith(f"You are {degree} {adjectives('openness', 'high' if alpha > 0 else 'low')}. ")


def test_each_split_has_its_questions():
    bench = Bench("b", {"openness": ["a", "a", "b"]}, {"openness": ["c", "d", "e", "f"]}, {})
    assert {split: bench.questions("openness", split, 2) for split in ("search", "test", "validation")} == {
        "search": ["a", "b"], "test": ["c", "d"], "validation": ["e"]}
    with pytest.raises(UserError, match="the split search, test or validation, got 'train'"):
        bench.questions("openness", "train", 2)


def test_few_validation_questions_are_said(capsys):
    bench = built_in_bench()
    bench.check_validation("openness", 18)
    assert not capsys.readouterr().err
    bench.test["openness"] = bench.test["openness"][:9]
    bench.check_validation("openness", 18)
    assert "levels of openness are read from 3 validation questions" in capsys.readouterr().err
    bench.test["openness"] = bench.test["openness"][:2]
    with pytest.raises(UserError, match="levels need 3"):
        bench.check_validation("openness", 18)


def test_test_questions_that_are_searched_with_are_said(tmp_path, capsys):
    save_bench(tmp_path)
    load_bench(str(tmp_path))
    assert "search questions as well" not in capsys.readouterr().err
    (tmp_path / "test" / "Openness.json").write_bytes((tmp_path / "search" / "Openness.json").read_bytes())
    number = len(load_bench(str(tmp_path)).test["openness"])
    assert f"{number} test questions of openness are search questions as well" in capsys.readouterr().err


def test_test_questions_that_are_searched_with_are_left_out(tmp_path, capsys):
    save_bench(tmp_path)
    path, first = tmp_path / "test" / "Openness.json", (tmp_path / "search" / "Openness.json").read_text().splitlines()[0]
    before, gone = load_bench(str(tmp_path)), json.loads(path.read_text().splitlines()[0])["question"]
    path.write_text(first + "\n" + "\n".join(path.read_text().splitlines()[1:]) + "\n")  # in the place of another
    capsys.readouterr()
    bench = load_bench(str(tmp_path))
    assert "1 test questions of openness are search questions as well, and are left out" in capsys.readouterr().err
    place, here, there = before.test["openness"].index(gone), bench.test["openness"], before.test["openness"]
    assert here[:place] + here[place + 1:] == there[:place] + there[place + 1:] and here[place] == json.loads(first)["question"]
    for split in ("test", "validation"):
        left = [question for question in before.questions("openness", split, 99) if question != gone]
        assert bench.questions("openness", split, 99) == left, "no other moves between them"


def test_a_search_question_that_stands_twice_is_asked_once(tmp_path, capsys):
    path = save_bench(tmp_path) / "search" / "Openness.json"
    load_bench(str(tmp_path))
    assert "asked once" not in capsys.readouterr().err
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    load_bench(str(tmp_path))
    assert "1 search questions of openness stand there again, and are asked once" in capsys.readouterr().err
    bench = built_in_bench()
    bench.search["openness"] = [bench.search["openness"][0]] * 2 + bench.search["openness"][1:]
    items = search_items(bench, "openness", 3, 0)
    assert [item["question"] for item in items[::2]] == list(dict.fromkeys(bench.search["openness"]))[:3]
