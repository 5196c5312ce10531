"""The catalog: what is read is what was meant, what is written is read back, and splits keep things apart."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.catalog import SCHEMA, Catalog
from samething.errors import ArtefactError, InputError

# text that a Parquet file can hold: no lone surrogates
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
filled_texts = texts.filter(bool)
rows_strategy = st.lists(
    st.fixed_dictionaries(
        {"image": filled_texts, "label": filled_texts},
        optional={
            "domain": filled_texts,
            "dataset": filled_texts,
            "role": st.sampled_from(["train", "val", "query", "index", "query+index"]),
            "width": st.none() | st.integers(1, 10_000),
            "height": st.none() | st.integers(1, 10_000),
            "sha256": st.none() | st.just("ab" * 32),
            "note": st.none() | texts,
        },
    ),
    max_size=12,
)


def write(folder: Path, text: str, *, name: str = "annotations.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def sized_catalog(sizes: dict[tuple[str, str], int]) -> Catalog:
    """A catalog with so many images of each (domain, label)."""
    rows = [
        {"image": f"{domain}/{label}/{number}.jpg", "label": label, "domain": domain}
        for (domain, label), size in sizes.items()
        for number in range(size)
    ]
    return Catalog.from_rows(rows, root=Path("images"))


def by_image(catalog: Catalog, column: str) -> dict[str, str]:
    return dict(zip(catalog.strings("image"), catalog.strings(column), strict=True))


# ---- CSV


def test_the_papers_annotation_file(tmp_path):
    catalog = Catalog.read(write(tmp_path, "img_path,label\na/1.jpg,007\na/2.jpg,7\nb/1.jpg,1e3\n"))
    assert list(catalog.strings("image")) == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    assert list(catalog.strings("label")) == ["007", "7", "1e3"]
    assert set(catalog.strings("domain")) == {"default"}
    assert set(catalog.strings("role")) == {"train"}
    assert set(catalog.strings("dataset")) == {"annotations"}
    assert catalog.table["width"].null_count == 3
    assert catalog.root == tmp_path
    assert catalog.paths[0] == tmp_path / "a" / "1.jpg"


def test_all_columns_and_further_ones(tmp_path):
    text = (
        "note,role,img_path,label,domain,dataset,width,height,sha256\n"
        "0012,query,1.jpg,x,cars,mine,640,480,aa\n"
        ",index,2.jpg,x,cars,mine,,,\n"
    )
    catalog = Catalog.read(write(tmp_path, text))
    assert catalog.table.to_pylist() == [
        {
            "image": "1.jpg", "label": "x", "domain": "cars", "dataset": "mine", "role": "query",
            "width": 640, "height": 480, "sha256": "aa", "note": "0012",
        },
        {
            "image": "2.jpg", "label": "x", "domain": "cars", "dataset": "mine", "role": "index",
            "width": None, "height": None, "sha256": "", "note": "",
        },
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends(tmp_path, encoding, line_end):
    text = line_end.join(["label,img_path", "007,a.jpg", "08,椅子.jpg", ""])
    catalog = Catalog.read(write(tmp_path, text, encoding=encoding))
    assert by_image(catalog, "label") == {"a.jpg": "007", "椅子.jpg": "08"}


def test_quoted_commas_quotes_and_line_breaks(tmp_path):
    text = '"img_path","label"\n"a, b.jpg","a ""chair"""\n"c.jpg","two\nlines"\nplain.jpg,"NA"\n'
    catalog = Catalog.read(write(tmp_path, text, name="with space ü.CSV"))
    assert by_image(catalog, "label") == {"a, b.jpg": 'a "chair"', "c.jpg": "two\nlines", "plain.jpg": "NA"}


def test_line_breaks_in_cells_of_a_file_that_is_read_in_several_blocks(tmp_path):
    lines = "".join(f'{row}.jpg,"a\n{row:07}"\n' for row in range(100_000))
    catalog = Catalog.read(write(tmp_path, f"img_path,label\n{lines}"))
    assert list(catalog.strings("label")) == [f"a\n{row:07}" for row in range(100_000)]


def test_empty_cells_get_defaults_but_an_empty_label_stays_to_be_reported(tmp_path):
    catalog = Catalog.read(write(tmp_path, "image,label,domain,role\na.jpg,,,\n"))
    assert by_image(catalog, "domain") == {"a.jpg": "default"}
    assert by_image(catalog, "role") == {"a.jpg": "train"}
    assert by_image(catalog, "label") == {"a.jpg": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,name\na,b\n", "has the columns path, name"),
        ("img_path;label\na;b\n", "img_path;label"),
        ("img_path,image,label\na,b,c\n", None),
        ("img_path,label,role\na,b,train\nc,d,testing\n", "row 1: role 'testing'"),
        ("img_path,label,width\na,b,wide\n", "column width"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, text, message):
    source = write(tmp_path, text)
    if message is None:  # both names: image counts, the other column is kept as a further one
        assert by_image(Catalog.read(source), "img_path") == {"b": "a"}
        return
    with pytest.raises(InputError, match=message) as caught:
        Catalog.read(source)
    assert str(source) in caught.value.given


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"img_path,label\na.jpg\n",
        b"img_path,label\na.jpg,b,c\n",
        b"img_path,label,label\na.jpg,b,c\n",
        "img_path,label\nä.jpg,b\n".encode("latin-1"),
        "img_path,läbel\na.jpg,b\n".encode("latin-1"),
    ],
    ids=["empty", "too few", "too many", "doubled", "latin-1", "latin-1 header"],
)
def test_a_csv_that_is_none_cannot_be_read(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"a\.csv cannot be read"):
        Catalog.read(tmp_path / "a.csv")


def test_a_table_without_rows_is_an_empty_catalog(tmp_path):
    catalog = Catalog.read(write(tmp_path, "img_path,label\n"))
    assert len(catalog) == 0
    assert catalog.domains == []
    assert catalog.counts() == []
    assert catalog.problems() == []
    assert catalog.class_ids().shape == (0,)
    assert len(catalog.split_by_class(val=0.1, test=0.1)) == 0
    catalog.require_files()
    assert len(Catalog.read(catalog.write(tmp_path / "empty.parquet"))) == 0


def test_a_missing_file_a_folder_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        Catalog.read(tmp_path / "nothing.parquet")
    with pytest.raises(ArtefactError, match="is not a file"):
        Catalog.read(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArtefactError, match="cannot be read"):
        Catalog.read(tmp_path / "a.parquet")


# ---- Parquet


@given(rows_strategy)
@settings(max_examples=60)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "round trip"
    catalog = Catalog.from_rows(rows, root=folder)
    read = Catalog.read(catalog.write(folder / "catalog.parquet"))
    assert read.table.to_pylist() == catalog.table.to_pylist()
    assert read.root.resolve() == folder.resolve()
    assert read.fingerprint == catalog.fingerprint
    content = (folder / "catalog.parquet").read_bytes()
    read.write(folder / "catalog.parquet")
    assert (folder / "catalog.parquet").read_bytes() == content


def test_equal_catalogs_give_equal_bytes_however_they_were_put_together(tmp_path):
    catalog = sized_catalog({("a", "x"): 3, ("a", "y"): 3})
    halves = Catalog(
        pa.concat_tables([catalog.take(np.arange(3)).table, catalog.take(np.arange(3, 6)).table]),
        catalog.root,
    )
    assert halves.fingerprint == catalog.fingerprint
    first, second = catalog.write(tmp_path / "a.parquet"), halves.write(tmp_path / "b.parquet")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("label_type", [pa.int64(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_foreign_parquet_of_any_type(tmp_path, label_type):
    labels = pa.array([1, 1, 2]) if label_type == pa.int64() else pa.array(["1", "1", "2"]).cast(label_type)
    table = pa.table({"img_path": ["a.jpg", "b.jpg", "c.jpg"], "label": labels, "width": [1.0, None, 3.0]})
    pq.write_table(table.replace_schema_metadata({"pandas": "{}"}), tmp_path / "foreign.parquet")
    catalog = Catalog.read(tmp_path / "foreign.parquet")
    assert catalog.table.schema.equals(SCHEMA)
    assert by_image(catalog, "label") == {"a.jpg": "1", "b.jpg": "1", "c.jpg": "2"}
    assert catalog.table["width"].to_pylist() == [1, None, 3]
    assert catalog.root == tmp_path


def test_a_number_that_is_none_is_refused(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "label": ["b"], "width": [1.5]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column width"):
        Catalog.read(tmp_path / "a.parquet")


def test_a_newer_format_is_refused(tmp_path):
    table = sized_catalog({("a", "x"): 1}).table.replace_schema_metadata({"samething.format_version": "99"})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ArtefactError, match="version 99"):
        Catalog.read(tmp_path / "a.parquet")


# ---- the root


@pytest.mark.parametrize(
    ("root", "target"),
    [
        ("images", "catalog.parquet"),
        ("images", "images/catalog.parquet"),
        ("images", "images/deep er/catalog.parquet"),
        (".", "catalogs/ü/catalog.parquet"),
    ],
)
def test_images_and_catalog_can_be_moved_together(tmp_path, root, target):
    before = tmp_path / "before"
    catalog = Catalog.from_rows([{"image": "a b/1.jpg", "label": "x"}], root=before / root)
    (before / root / "a b").mkdir(parents=True)
    (before / root / "a b" / "1.jpg").write_bytes(b"x")
    catalog.write(before / target)
    after = tmp_path / "äfter"
    before.rename(after)
    moved = Catalog.read(after / target)
    assert [path.resolve() for path in moved.paths] == [(after / root / "a b" / "1.jpg").resolve()]
    moved.require_files()
    assert moved.fingerprint == catalog.fingerprint


def test_a_root_elsewhere_is_kept_and_can_be_overridden(tmp_path):
    catalog = Catalog.from_rows([{"image": "1.jpg", "label": "x"}], root=tmp_path / "images")
    target = catalog.write(tmp_path / "catalogs" / "catalog.parquet")
    assert Catalog.read(target).root == (tmp_path / "images").resolve()
    assert Catalog.read(target, root=tmp_path / "other").root == tmp_path / "other"


def test_moved_images_are_noticed(tmp_path):
    catalog = Catalog.from_rows([{"image": "1.jpg", "label": "x"}], root=tmp_path / "gone")
    with pytest.raises(ArtefactError, match="none of the first 1 images") as caught:
        catalog.require_files()
    assert "--root" in caught.value.next_step


# ---- rows


def test_rows_take_numbers_and_paths_as_text():
    catalog = Catalog.from_rows(
        [{"image": Path("a/1.jpg"), "label": 7, "domain": None}, {"image": "b.jpg", "label": "7"}],
        root=Path("images"),
    )
    assert by_image(catalog, "label") == {"a/1.jpg": "7", "b.jpg": "7"}
    assert catalog.domains == ["default"]


def test_rows_without_images_or_with_unknown_roles_are_refused():
    with pytest.raises(InputError, match="row 0: role 'tset'"):
        Catalog.from_rows([{"image": "a", "label": "b", "role": "tset"}], root=Path())
    with pytest.raises(InputError, match="without the columns"):
        Catalog(pa.table({"image": ["a"]}), Path())
    with pytest.raises(InputError, match="role 'tset'"):
        sized_catalog({("a", "x"): 1}).with_column("role", ["tset"])


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "a/b", "a/a"]), st.sampled_from(["x", "b/x", "a/x", "b/b/x"]))
    )
)
def test_labels_are_unique_across_domains_and_instances_stay_themselves(pairs):
    rows = [
        {"image": str(row), "label": label, "domain": domain} for row, (domain, label) in enumerate(pairs)
    ]
    try:
        catalog = Catalog.from_rows(rows, root=Path())
    except InputError as error:
        # only where domain/label is taken by another pair
        clash = error.next_step.removeprefix("rename the label ").strip("'")
        assert len({pair for pair in pairs if clash in (pair[1], "/".join(pair))}) > 1
        return
    found = list(zip(catalog.strings("domain"), catalog.strings("label"), strict=True))
    assert [domain for domain, _ in found] == [domain for domain, _ in pairs]
    # the same pairs before and after, one to one
    assert (
        len({(old, new) for old, new in zip(pairs, found, strict=True)}) == len(set(pairs)) == len(set(found))
    )
    assert len({label for _, label in found}) == len(set(found))


def test_only_shared_labels_are_prefixed():
    catalog = sized_catalog({("cars", "7"): 1, ("food", "7"): 1, ("food", "8"): 1})
    assert sorted(catalog.strings("label")) == ["8", "cars/7", "food/7"]


def test_a_prefixed_label_that_is_taken_is_refused():
    with pytest.raises(InputError, match="'a/x' is there already") as caught:
        sized_catalog({("a", "x"): 1, ("b", "x"): 1, ("a", "a/x"): 1})
    assert caught.value.next_step == "rename the label 'a/x'"


def test_take_with_a_mask_and_with_rows():
    catalog = sized_catalog({("a", "x"): 3})
    assert list(catalog.take(np.array([False, True, True])).strings("image")) == ["a/x/1.jpg", "a/x/2.jpg"]
    assert list(catalog.take([2, 0]).strings("image")) == ["a/x/2.jpg", "a/x/0.jpg"]
    assert len(catalog.take([])) == 0


def test_has_role():
    catalog = sized_catalog({("a", "x"): 4}).with_column("role", ["train", "query", "query+index", "val"])
    np.testing.assert_array_equal(catalog.has_role("query", "query+index"), [False, True, True, False])
    assert not catalog.has_role("index").any()


@given(rows_strategy)
def test_class_ids_are_numbered_by_domain_and_label(rows):
    catalog = Catalog.from_rows(rows, root=Path())
    keys = list(zip(catalog.strings("domain"), catalog.strings("label"), strict=True))
    found = catalog.class_ids()
    assert len(set(zip(keys, found.tolist(), strict=True))) == len(set(keys)) == len(set(found.tolist()))
    assert set(found.tolist()) == set(range(len(set(keys))))


def test_class_ids_are_sorted():
    catalog = sized_catalog({("b", "y"): 1, ("b", "x"): 2, ("a", "z"): 1})
    np.testing.assert_array_equal(catalog.class_ids(), [2, 1, 1, 0])


# ---- fingerprint


def test_the_fingerprint_covers_content_and_order_but_not_root_and_further_columns():
    catalog = sized_catalog({("a", "x"): 2, ("a", "y"): 1})
    same = [
        Catalog(catalog.table, Path("elsewhere")),
        catalog.with_column("note", [1, 2, 3]),
        catalog.take([0, 1, 2]),
    ]
    others = [
        catalog.take([1, 0, 2]),
        catalog.take([0, 1]),
        catalog.with_column("width", [None, None, 3]),
        catalog.with_column("label", ["a", "a", "z"]),
        catalog.split_by_class(val=0.9, test=0.0),
    ]
    assert {other.fingerprint for other in same} == {catalog.fingerprint}
    prints = [catalog.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == len(prints)


# ---- problems


def test_each_problem_is_found_with_its_row(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"x")
    catalog = Catalog.from_rows(
        [
            {"image": "a.jpg", "label": "x", "sha256": "11"},
            {"image": "missing ü.jpg", "label": "x"},
            {"image": "b.jpg", "label": " "},
            {"image": "./a.jpg", "label": "x", "sha256": "11"},
            {"image": "c.jpg", "label": "y", "sha256": "11"},
            {"image": "", "label": "y"},
        ],
        root=tmp_path,
    )
    found = [(problem.row, problem.severity, problem.message) for problem in catalog.problems()]
    assert [(row, severity) for row, severity, _ in found] == [
        (1, "error"), (2, "error"), (3, "error"), (4, "warning"), (5, "error"),
    ]  # fmt: skip
    messages = [message for _, _, message in found]
    assert "missing ü.jpg does not exist" in messages[0]
    assert messages[1] == "b.jpg has an empty label"
    assert messages[2] == "./a.jpg is listed twice (first in row 0)"
    assert messages[3] == "c.jpg is the same image as a.jpg (row 0), which has the label 'x', not 'y'"
    assert messages[4] == "the path is empty"
    assert str(catalog.problems()[0]).startswith("row 1: ")
    assert [problem.row for problem in catalog.problems(check_files=False)] == [2, 3, 4, 5]


def test_the_same_image_under_one_label_is_no_problem(tmp_path):
    rows = [{"image": f"{name}.jpg", "label": "x", "sha256": "11"} for name in "ab"]
    assert Catalog.from_rows(rows, root=tmp_path).problems(check_files=False) == []


def test_counts():
    catalog = sized_catalog({("b", "x"): 2, ("a", "y"): 1, ("b", "z"): 3})
    catalog = catalog.with_column("role", ["query", "query", "train", "train", "train", "train"])
    assert catalog.counts() == [
        {"domain": "a", "role": "train", "instances": 1, "images": 1},
        {"domain": "b", "role": "train", "instances": 1, "images": 3},
        {"domain": "b", "role": "query", "instances": 1, "images": 2},
    ]


# ---- splits

sizes_strategy = st.dictionaries(
    st.tuples(st.sampled_from(["cars", "küche", "art"]), st.integers(0, 30).map(str)),
    st.integers(1, 4),
    min_size=1,
)
shares = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: sum(pair) < 10)


@given(sizes_strategy, shares, st.integers(0, 1000))
@settings(max_examples=60)
def test_a_split_keeps_things_apart_and_keeps_the_shares(sizes, tenths, seed):
    val, test = tenths[0] / 10, tenths[1] / 10
    catalog = sized_catalog(sizes)
    split = catalog.split_by_class(val=val, test=test, seed=seed)
    assert split.table.drop_columns(["role"]).equals(catalog.table.drop_columns(["role"]))
    labels, roles = split.strings("label"), split.strings("role")
    role_of = dict(zip(labels, roles, strict=True))
    assert set(zip(labels, roles, strict=True)) == set(role_of.items()), "one role for each thing"
    images = Counter(labels)
    assert all(role_of[label] == "train" for label, count in images.items() if count == 1)
    for domain in split.domains:
        members = {
            label
            for label, itself in zip(labels, split.strings("domain"), strict=True)
            if itself == domain and images[label] > 1
        }
        counted = Counter(role_of[label] for label in members)
        assert abs(counted["val"] - val * len(members)) <= 0.5
        assert abs(counted["query+index"] - test * len(members)) <= 0.5
        assert set(counted) <= {"train", "val", "query+index"}


@given(sizes_strategy, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_a_split_depends_on_neither_row_order_nor_other_domains(sizes, random):
    catalog = sized_catalog(sizes)
    split = by_image(catalog.split_by_class(val=0.2, test=0.3, seed=1), "role")
    order = list(range(len(catalog)))
    random.shuffle(order)
    assert by_image(catalog.take(order).split_by_class(val=0.2, test=0.3, seed=1), "role") == split
    alone = catalog.take(catalog.strings("domain") == "cars").split_by_class(val=0.2, test=0.3, seed=1)
    assert by_image(alone, "role").items() <= split.items()


def test_another_seed_is_another_split_and_the_same_is_the_same():
    catalog = sized_catalog({("a", str(number)): 2 for number in range(40)})
    splits = [catalog.split_by_class(val=0.2, test=0.2, seed=seed) for seed in (0, 0, 1)]
    assert splits[0].fingerprint == splits[1].fingerprint != splits[2].fingerprint


@pytest.mark.parametrize(
    ("val", "test", "seed"), [(0.5, 0.5, 0), (-0.1, 0.0, 0), (0.0, 1.0, 0), (0.1, 0.1, -1)]
)
def test_impossible_shares_are_refused(val, test, seed):
    with pytest.raises(InputError, match="val="):
        sized_catalog({("a", "x"): 2}).split_by_class(val=val, test=test, seed=seed)


def test_domains_are_not_split_alike():
    catalog = sized_catalog({(domain, f"{domain}{number:02}"): 2 for domain in "ab" for number in range(40)})
    roles = catalog.split_by_class(val=0.2, test=0.3).strings("role")
    assert list(roles[:80]) != list(roles[80:])


# ---- size


@pytest.mark.slow
def test_a_large_catalog():
    """A second on two cores; anything quadratic would take minutes."""
    num_rows = 200_000
    numbers = np.arange(num_rows) // 5
    hashes = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(num_rows)]
    table = pa.table(
        {
            "image": [f"folder/{number}/{row}.jpg" for row, number in enumerate(numbers)],
            "label": [f"label {number}" for number in numbers],
            "domain": [f"domain {number % 4}" for number in numbers],
            "dataset": ["mine"] * num_rows,
            "role": ["train"] * num_rows,
            "width": pa.nulls(num_rows, pa.int32()),
            "height": pa.nulls(num_rows, pa.int32()),
            "sha256": hashes,
        }
    )
    catalog = Catalog(table, Path("images"))
    assert catalog.class_ids().max() == num_rows // 5 - 1
    assert len(catalog.strings("image")) == num_rows
    assert len(catalog.fingerprint) == 16
    assert catalog.problems(check_files=False) == []
    split = catalog.split_by_class(val=0.1, test=0.2)
    assert sum(row["images"] for row in split.counts()) == num_rows


def test_numbers_of_a_csv_are_numbers_and_pandas_columns_are_taken(tmp_path):
    """Before, --where price=1.. found nothing: as every column was text; capitals, pandas: refused."""
    lines = [
        ",Image, Label ,Price,Size EU,code,note",
        '0,a.jpg,007,12,38.5,007,"1,5"',
        "1,b.jpg,8,,-1e3,12,x",
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    table = Catalog.read(tmp_path / "t.csv").table
    assert table["label"].to_pylist() == ["007", "8"] and "" not in table.column_names
    assert table["price"].to_pylist() == [12, None] and table["size_eu"].to_pylist() == [38.5, -1000.0]
    assert table["code"].to_pylist() == ["007", "12"] and table["note"].to_pylist() == ["1,5", "x"]
    pandas = pa.table({"IMG_PATH": ["a.jpg"], "Label": ["x"], "__index_level_0__": [4]})
    pq.write_table(pandas, tmp_path / "t.parquet")
    read = Catalog.read(tmp_path / "t.parquet").table
    assert read["image"].to_pylist() == ["a.jpg"] and "__index_level_0__" not in read.column_names


def test_paths_with_backslashes_say_what_is_wrong(tmp_path):
    """Before, the advice was to give another folder with --root, which cannot help."""
    (tmp_path / "t.csv").write_text("img_path,label\na\\1.jpg,x\na\\2.jpg,x\n")
    with pytest.raises(ArtefactError) as error:
        Catalog.read(tmp_path / "t.csv").require_files()
    assert "write / for" in error.value.next_step
