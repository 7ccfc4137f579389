"""Reading sequences: each kind of file made by hand, with the rows it must give; pickles refused."""

import json
import pickle

import pytest

from experiments.llara import data
from experiments.llara.data import CorpusError, Row, load_corpus, movie_title

ITEMS = (
    "Toy Story (1995)",
    "Usual Suspects, The (1995)",
    "Heat (1995)",
    "Seven (1995)",
    "unknown",
    "Big, Bad (1990)",
)


def _write_titles(directory, titles=ITEMS):
    lines = [f"{k + 1}|{title}|01-Jan-1995||url|0" for k, title in enumerate(titles)]
    (directory / "u.item").write_text("\n".join(lines) + "\n", encoding="iso-8859-1")


def _write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_llara(directory):
    _write_titles(directory)
    train = [{"user": 7, "seq": [[k, 5] for k in range(n)], "next": [n, 4]} for n in range(5)]
    train.append({"user": 9, "seq": [[4, 3], [3, 3], [2, 3]], "next": [0, 5]})
    _write_jsonl(directory / "train.jsonl", train)
    padded = [[1, 3], [2, 3], [3, 5], [1682, 0]]
    for split in ("val", "test"):
        _write_jsonl(directory / f"{split}.jsonl", [{"seq": padded, "len_seq": 3, "next": [0, 4]}])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects"),
        ("Bug's Life, A (1998)", "A Bug's Life"),
        ("Walk, Another (1996)", "Walk, Another"),
        ("unknown", "unknown"),
        ("2 Days in the Valley (1996)", "2 Days in the Valley"),
    ],
)
def test_a_title_loses_its_year_and_a_trailing_article_comes_first(given, expected):
    assert movie_title(given) == expected


def test_llara_rows_have_ids_by_user_and_position_and_no_padding(tmp_path):
    _write_llara(tmp_path)
    corpus = load_corpus(tmp_path)
    assert corpus.domain == "movie"
    assert corpus.titles[1] == "The Usual Suspects"
    assert corpus.num_items == 6
    assert corpus.train == (
        Row(id="7-3", user="7", history=(0, 1, 2), target=3),
        Row(id="7-4", user="7", history=(0, 1, 2, 3), target=4),
        Row(id="9-0", user="9", history=(4, 3, 2), target=0),
    )
    assert corpus.val == (Row(id="val-0", user="", history=(1, 2, 3), target=0),)


def test_an_item_without_a_title_is_named(tmp_path):
    _write_llara(tmp_path)
    _write_jsonl(tmp_path / "val.jsonl", [{"seq": [[0, 3], [1, 3], [2, 3]], "next": [77, 4]}])
    with pytest.raises(CorpusError, match="val-0: item 77 has no title"):
        load_corpus(tmp_path)


def test_rows_of_another_form_are_named_by_line(tmp_path):
    _write_llara(tmp_path)
    _write_jsonl(tmp_path / "val.jsonl", [{"seq": [0, 1, "two"], "next": 3}])
    with pytest.raises(CorpusError, match=r"val.jsonl, line 1: expected seq, a list of items"):
        load_corpus(tmp_path)


def test_llaras_other_splits_name_items_alone_and_titles_by_number(tmp_path):
    # As its LastFM and Steam: padded with the number after the last item; a name may hold a colon.
    (tmp_path / "id2name.txt").write_text("".join(f"{k}::Band {k}: live\n" for k in range(5)))
    rows = [
        {"user": 3, "domain": "artist", "seq": [0, 1, 2, 5], "len_seq": 3, "next": 3},
        {"seq": [4, 3, 2], "next": 0},
    ]
    _write_jsonl(tmp_path / "train.jsonl", rows)
    for split in ("val", "test"):
        _write_jsonl(tmp_path / f"{split}.jsonl", [{"seq": [3, 2, 1, 5], "next": 4}])
    corpus = load_corpus(tmp_path)
    assert corpus.domain == "artist" and corpus.titles[4] == "Band 4: live" and corpus.num_items == 5
    assert corpus.train == (
        Row(id="3-0", user="3", history=(0, 1, 2), target=3),
        Row(id="train-0", user="", history=(4, 3, 2), target=0),
    )
    assert corpus.test == (Row(id="test-0", user="", history=(3, 2, 1), target=4),)
    _write_jsonl(tmp_path / "train.jsonl", [{**rows[0], "domain": "opera"}])
    with pytest.raises(CorpusError, match=r"train.jsonl, line 1: domain is 'opera'"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("name", ["train_data.df", "movielens.pkl"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CorpusError, match=r"is a pickle, which is not read.*orient='records'"):
        load_corpus(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_unknown_files_are_answered_with_what_is_expected(tmp_path):
    with pytest.raises(CorpusError, match=r"u.data \+ u.item"):
        load_corpus(tmp_path)


def _sequences(corpus):
    """The items of every user, rebuilt from its last row."""
    last = {}
    for row in (*corpus.train, *corpus.val, *corpus.test):
        last[row.user] = (*row.history, row.target)
    return last


def test_movielens_keeps_liked_films_in_the_order_of_time_and_splits_by_user(tmp_path):
    _write_titles(tmp_path)
    lines = []
    for user in range(10):
        # Item 6 is rated 2 stars and so no interaction; times run backwards, items 1 and 2 at one time.
        times = {1: 50, 2: 50, 3: 40, 4: 30, 5: 20, 6: 10}
        lines += [f"{user}\t{item}\t{2 if item == 6 else 3}\t{time}" for item, time in times.items()]
    (tmp_path / "u.data").write_text("\n".join(lines) + "\n")
    corpus = load_corpus(tmp_path)
    assert set(_sequences(corpus).values()) == {(4, 3, 2, 0, 1)}
    users = [{row.user for row in part} for part in (corpus.train, corpus.val, corpus.test)]
    assert [len(part) for part in users] == [8, 1, 1]
    assert set.union(*users) == {str(user) for user in range(10)}
    assert len(corpus.train) == 16  # positions 3 and 4 of each
    assert {row.id.split("-")[1] for row in corpus.test} == {"4"}
    assert load_corpus(tmp_path) == corpus


def test_a_title_may_hold_what_only_some_take_for_a_line_end(tmp_path):
    _write_titles(tmp_path, ("Wait\x85 What", "Heat (1995)"))
    assert data.load_movie_titles(tmp_path / "u.item") == {0: "Wait\x85 What", 1: "Heat"}


def test_a_history_holds_the_last_ten_items(tmp_path):
    _write_titles(tmp_path, [f"Film {k} (1990)" for k in range(14)])
    lines = [f"{user}\t{item + 1}\t4\t{item}" for user in range(3) for item in range(14)]
    (tmp_path / "u.data").write_text("\n".join(lines))
    (row,) = load_corpus(tmp_path).test
    assert row.history == tuple(range(3, 13))
    assert row.target == 13
