"0_base/02_record: rows that survive, files that are whole, summaries that agree with numpy."
import json, math, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from timet_nb.base.record import MIME, append_line, collect, plain, read_json, record, summarise, table, write_json
from timet_nb.base.runtime import DataError

ROOT = Path(__file__).resolve().parent.parent
relaxed = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
leaves = st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | text
nests = st.recursive(leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(text, x, max_size=4), max_leaves=12)


# ---- one row ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [.5, np.float32(.5), np.float64(.5), torch.tensor(.5), torch.tensor([[.5]]), np.array([.5]),
                                   torch.tensor(.5, dtype=torch.bfloat16), torch.tensor(.5, requires_grad=True)])
def test_record_takes_any_scalar(value, tmp_path):
    row = record("J", value, "%", out=tmp_path, seed=np.int64(3), clip="dog", thr=torch.tensor(.25), dtype=torch.float16)
    assert row == dict(name="J", value=.5, unit="%", seed=3, clip="dog", thr=.25, dtype="float16")
    assert type(row["value"]) is float and type(row["seed"]) is int
    assert collect(tmp_path) == [{**row, "source": "metrics.jsonl"}]


@pytest.mark.parametrize("value, word", [(float("nan"), "nan"), (np.inf, "inf"), (torch.tensor(-float("inf")), "-inf")])
def test_a_number_that_is_not_finite_is_null_with_a_flag(value, word, tmp_path, capsys):
    row = record("loss", value, out=tmp_path, best=float("nan"))
    assert row["value"] is None and row["not_finite"] == word and row["best"] == "nan"
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda w: pytest.fail(f"{w} in the file")) == row
    assert f"loss = {word}" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["high", None, [1, 2], np.zeros(3), {"a": 1}, object()])
def test_what_is_not_one_number_is_refused(value, tmp_path):
    with pytest.raises(DataError, match="J"): record("J", value, out=tmp_path)
    with pytest.raises(DataError, match="J.model: got object"): record("J", 1, out=tmp_path, model=object())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_paths_lose_their_folders():
    assert plain({"a": Path("/home/somebody/dog.mp4")}) == {"a": "dog.mp4"}


@settings(max_examples=60, **relaxed)
@given(rows=st.lists(st.dictionaries(text.filter(lambda k: k not in ("name", "value", "unit", "out", "not_finite", "source")), nests,
                                     max_size=4), min_size=1, max_size=4))
def test_rows_come_back_as_they_went(rows, tmp_path_factory):
    "Any context, with line ends of every kind in it, comes back equal and in order."
    folder = tmp_path_factory.mktemp("r")
    for i, context in enumerate(rows): append_line(folder / "m.jsonl", dict(name="x", value=i, **context))
    assert collect(folder) == [dict(name="x", value=i, **c, source="m.jsonl") for i, c in enumerate(rows)]


# ---- kills and neighbours --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_torn_line_costs_only_itself(cut, tmp_path):
    path = tmp_path / "m.jsonl"; rows = [dict(name="J", value=i, note="ä" * 8) for i in range(3)]
    append_line(path, rows[0]); start = path.stat().st_size
    append_line(path, rows[1]); os.truncate(path, min(start + cut, path.stat().st_size - 1))
    append_line(path, rows[2])
    kept = collect(path, on_error="skip")
    assert [r["value"] for r in kept] == [0, 2] and len(kept.skipped) == (cut > 0)
    if cut:
        with pytest.raises(DataError, match="m.jsonl line 2"): collect(path)


WRITER = """
    import sys; from timet_nb.base.record import append_line
    print("go", flush=True)
    for i in range(int(sys.argv[3])): append_line(sys.argv[1], dict(name="n", value=i, who=sys.argv[2], pad="x" * 3000))
"""


def writer(path, who, count):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(who), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 and locks of POSIX")
def test_processes_beside_each_other_and_kill_9(tmp_path):
    "Two processes finish, one is killed on the way: every line of the first two is there, and at most one line is torn."
    path = tmp_path / "m.jsonl"; jobs = [writer(path, "a", 40), writer(path, "b", 40), writer(path, "killed", 10**6)]
    for job in jobs: job.stdout.readline()
    time.sleep(.1 + .2 * random.Random(0).random()); jobs[2].send_signal(signal.SIGKILL)
    for job in jobs: job.wait(60); job.stdout.close()
    rows = collect(path, on_error="skip")
    for who in "ab": assert [r["value"] for r in rows if r["who"] == who] == list(range(40))
    assert len(rows.skipped) <= 1
    killed = [r["value"] for r in rows if r["who"] == "killed"]
    assert killed == list(range(len(killed)))


def test_append_says_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(DataError, match="cannot write"): record("J", 1, out=out)


# ---- collecting ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [b'{"name": "J", "va', b"\xff\xfe\x00", b"<html>", b"[1, 2]", b"3", b'{"name": "J"}', b'{"name": 1, "value": NaN}',
                                  b"[" * 50_000, b"1" * 5_000, b"null"])
def test_a_broken_line_is_named(line, tmp_path):
    path = tmp_path / "m.jsonl"; good = b'{"name": "J", "value": 1}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError, match="m.jsonl line 3"): collect(tmp_path)
    rows = collect(tmp_path, on_error="skip")
    assert len(rows) == 2 and len(rows.skipped) == 1 and "line 3" in rows.skipped[0]


def test_collect_walks_folders_in_order_and_leaves_hidden_files(tmp_path):
    for name in ("b/m.jsonl", "a.jsonl", ".tmp/m.jsonl", "b/.m.jsonl", "b/notes.txt"):
        if name.endswith(".jsonl"): append_line(tmp_path / name, dict(name=name, value=1))
        else: (tmp_path / name).write_text("hello")
    assert [r["source"] for r in collect(tmp_path)] == ["a.jsonl", "b/m.jsonl"]
    assert [r["name"] for r in collect(tmp_path / "b", tmp_path / "a.jsonl")] == ["b/m.jsonl", "a.jsonl"]
    with pytest.raises(DataError, match="nothing there"): collect(tmp_path / "c")
    with pytest.raises(DataError, match="on_error"): collect(tmp_path, on_error="ignore")
    assert collect() == []


def run_book(tmp_path, *sources):
    "Execute cells in a kernel by papermill, as the suite does; the executed file is there also after a failure."
    papermill = pytest.importorskip("papermill")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / "in.ipynb")
    error, out = None, tmp_path / "done" / "run.ipynb"; out.parent.mkdir()
    try: papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(out), progress_bar=False, kernel_name="python3", cwd=str(ROOT))
    except papermill.PapermillExecutionError as e: error = e
    return out, error


def test_an_executed_notebook_is_a_result_file(tmp_path):
    out, error = run_book(tmp_path, "from timet_nb.base.record import record\nrecord('J', .5, seed=1);",
                          "import torch; x = [record('F', torch.tensor(float('nan')), '%', seed=s) for s in range(2)]", "1 / 0",
                          "record('never', 1)")
    assert "ZeroDivisionError" in str(error)
    rows = collect(out.parent); duration = rows[0].pop("duration", None)
    assert rows[0] == dict(incomplete=True, name="J", value=.5, unit="", seed=1, source="run.ipynb") and duration is not False
    assert [(r["name"], r["value"], r["not_finite"], r["seed"]) for r in rows[1:]] == [("F", None, "nan", 0), ("F", None, "nan", 1)]
    shown = [o["data"] for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if MIME in o.get("data", {})]
    assert shown[0]["text/plain"] == "J = 0.5   (seed=1)"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": 3}', "<html>", '{"cells": [{"outputs": [{"data": {"%s": 1}}]}]}' % MIME])
def test_a_broken_notebook_is_named(content, tmp_path):
    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(DataError, match="a.ipynb"): collect(tmp_path)
    assert len(collect(tmp_path, on_error="skip").skipped) == 1


BOOK = json.dumps({"cells": [{"cell_type": "code", "outputs": [{"output_type": "display_data", "data": {MIME: {"name": "J", "value": 1}}}]}],
                   "metadata": {"papermill": {"duration": 1.5, "exception": None}}}).encode()
LINES = b"".join(json.dumps(dict(name="J", value=i, unit="%", clip="d\xc3\xb6g")).encode() + b"\n" for i in range(3))


@settings(max_examples=250, **relaxed)
@given(data=st.data(), which=st.sampled_from(["a.jsonl", "a.ipynb", "a.json"]))
def test_byte_flips_end_in_our_error_or_in_rows(data, which, tmp_path_factory):
    "Flip, cut and insert bytes: the reader answers with rows or with a DataError that names the file."
    raw = bytearray(LINES if which == "a.jsonl" else BOOK)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1)); kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip": raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut": del raw[at:at + data.draw(st.integers(1, 20))]
        else: raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not raw: break
    path = tmp_path_factory.mktemp("f") / which; path.write_bytes(bytes(raw))
    try: found = read_json(path) if which == "a.json" else collect(path)
    except DataError as error: assert which in str(error)
    else: assert which == "a.json" or all({"name", "value", "source"} <= set(r) for r in found)
    if which != "a.json": assert all(which in message for message in collect(path, on_error="skip").skipped)


# ---- whole files -----------------------------------------------------------------------------------------------------

@settings(max_examples=60, **relaxed)
@given(nests)
def test_json_round_trip(tmp_path_factory, x):
    path = tmp_path_factory.mktemp("j") / "deep" / "a.json"
    assert read_json(write_json(path, x)) == x and os.listdir(path.parent) == ["a.json"]


def test_write_json_refuses_nan_by_its_place_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"; write_json(path, {"a": torch.arange(3), "b": (np.float32(.5),)})
    for bad, where in [({"a": [1, {"b": float("nan")}]}, r"\$.a\[1\].b: got nan"), (torch.tensor([1., float("inf")]), r"\$\[1\]: got inf"),
                       ({"f": open}, r"\$.f: got builtin")]:
        with pytest.raises(DataError, match=where): write_json(path, bad)
    assert read_json(path) == {"a": [0, 1, 2], "b": [.5]}


@pytest.mark.parametrize("junk", [b"", b"{", b'{"a": NaN}', b"<html></html>", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'"\\ud8"'])
def test_read_json_names_the_file(junk, tmp_path):
    (tmp_path / "a.json").write_bytes(junk)
    with pytest.raises(DataError, match="a.json: got"): read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="No such file"): read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="irectory"): read_json(tmp_path)


# ---- summaries and tables --------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.floats(-1e3, 1e3)), min_size=1, max_size=20), st.randoms())
def test_summarise_agrees_with_numpy_in_any_order(values, rng):
    rows = [dict(name="J", m=m, seed=s, value=v) for m, s, v in values]; shuffled = rows[:]; rng.shuffle(shuffled)
    for by in (["m"], ["m", "seed"], "name"):
        keys = [by] if isinstance(by, str) else by
        other = {tuple(r[k] for k in keys): r for r in summarise(shuffled, by)}
        for g in summarise(rows, by):
            v = np.array([r["value"] for r in rows if all(r[k] == g[k] for k in keys)])
            assert g["n"] == len(v) and g["missing"] == 0 and (g["min"], g["max"]) == (v.min(), v.max())
            assert math.isclose(g["mean"], v.mean(), abs_tol=1e-9)
            assert g["sd"] is None if len(v) == 1 else math.isclose(g["sd"], v.std(ddof=1), abs_tol=1e-9)
            same = other[tuple(g[k] for k in keys)]
            assert math.isclose(same["mean"], g["mean"], abs_tol=1e-9) and same["n"] == g["n"]


def test_summarise_counts_what_is_missing_and_tells_keys_apart():
    rows = [dict(value=1, k=1), dict(value=None, k=1), dict(value=float("nan"), k=1), dict(value=True, k="1"), dict(value=4, k=None), dict(value=6)]
    assert [(g["k"], g["mean"], g["n"], g["missing"]) for g in summarise(rows, "k")] == [(1, 1, 1, 2), ("1", 1, 1, 0), (None, 5, 2, 0)]
    assert summarise([dict(name="J", value=None)])[0] == dict(name="J", mean=None, sd=None, n=0, min=None, max=None, missing=1)
    assert summarise([]) == [] and summarise([dict(clip="a", J=2)], "clip", value="J")[0]["mean"] == 2
    with pytest.raises(DataError, match="row 1"): summarise([dict(name="a", value=1), dict(name="b")])
    with pytest.raises(DataError, match="'high'"): summarise([dict(name="a", value="high")])


def test_table():
    t = table([dict(clip="a|b\nc", J=.12345, n=3), dict(clip="d", J=None, ok=True), dict(J=torch.tensor(.5))])
    assert t.markdown.splitlines() == ["| clip | J | n | ok |", "| --- | ---: | ---: | --- |", "| a\\|b c | 0.123 | 3 |  |",
                                       "| d | – |  | True |", "|  | 0.500 |  |  |"]
    assert t._repr_markdown_() == t.markdown and len(t) == 3 and t.rows[1]["clip"] == "d"
    assert table([dict(a=1., b=2)], {"b": "B", "a": "A"}, floatfmt=".1f").markdown.splitlines()[::2] == ["| B | A |", "| 2 | 1.0 |"]
    assert str(table([])) == "" and str(table([dict(a=1)])).splitlines() == ["a", "1"]
    with pytest.raises(DataError, match="column 'j': got no row has it"): table([dict(J=1)], ["j"])
