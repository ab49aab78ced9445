"""The table of methods, and methods of other packages: found by name, loaded when asked for, told of when broken."""

import sys

import pytest

from absorber.bench.methods import BM25, ENTRY_POINTS, METHODS, TTT, method, others
from absorber.bench.methods.truncation import Truncation
from absorber.bench.records import read_records
from absorber.errors import BenchmarkError, ConfigError

CODE = """
from absorber.bench.methods.truncation import Truncation

class Mine(Truncation):
    pass

ready = Mine()

def wrong():
    return "nothing"

def failing():
    raise RuntimeError("no such device")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with entry points on the path, as an installation does."""
    monkeypatch.syspath_prepend(tmp_path)

    def call(package, **points):
        (tmp_path / f"{package}.py").write_text(CODE)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {package}:{value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}")

    yield call
    for name in ("stranger", "another"):
        sys.modules.pop(name, None)


def test_methods_of_another_package_are_found_and_loaded_when_asked_for(install):
    install("stranger", mine="Mine", ready="ready", gone="Gone")
    assert set(others()) == {"mine", "ready", "gone"}
    assert "stranger" not in sys.modules
    for name in ("mine", "ready"):
        found = method(name)
        assert isinstance(found, Truncation)
        assert type(found).__name__ == "Mine"
    assert not set(others()) & set(METHODS)
    with pytest.raises(BenchmarkError, match=r"there is no method 'magic'; there are full, .*mine"):
        method("magic")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Gone", r"'bad' \(stranger:Gone of stranger\) cannot be loaded: AttributeError.*Update or uninstall"),
        ("failing", "cannot be loaded: RuntimeError: no such device"),
        ("wrong", "is str, not an absorber.bench.methods.Method"),
    ],
)
def test_a_broken_one_is_named_and_disturbs_no_other(install, value, message):
    install("stranger", bad=value, good="Mine")
    with pytest.raises(BenchmarkError, match=message):
        method("bad")
    assert isinstance(method("good"), Truncation)
    assert method("full") is METHODS["full"]


def test_ours_stay_ours_and_two_of_one_name_are_an_error(install):
    install("stranger", truncation="Mine", twice="Mine")
    assert method("truncation") is METHODS["truncation"]
    assert set(others()) == {"twice"}
    install("another", twice="Mine")
    with pytest.raises(BenchmarkError, match="two packages have a method 'twice'"):
        method("twice")
    assert method("full") is METHODS["full"]


def test_settings_are_changed_by_name_or_refused():
    assert METHODS["ttt"].replace(learning_rate=0.25) == TTT(learning_rate=0.25)
    assert METHODS["bm25"].replace() == BM25()
    changed = METHODS["dcd"].replace(learning_rate=3e-4).config()
    assert changed == METHODS["dcd"].config() | {"learning_rate": 3e-4}
    for name, values in {"ttt": {"rate": 1.0}, "full": {"scale": 1.0}, "dcd": {"rate": 1.0}}.items():
        with pytest.raises(ConfigError, match=r"rate|scale"):
            METHODS[name].replace(**values)
    with pytest.raises(ConfigError):
        METHODS["ttt"].replace(scale=-1.0)
    with pytest.raises(ConfigError, match="of a wrong type"):
        METHODS["ttt"].replace(scale="much")


def test_the_command_line_runs_one(install, tmp_path, monkeypatch, capsys):
    from absorber.bench import retention
    from absorber.cli import run

    monkeypatch.setattr(retention, "DRIFT_KINDS", ("books",))
    monkeypatch.setattr(retention.Retention.prepare, "__kwdefaults__", {"drift_kinds": ("books",)})
    install("stranger", mine="Mine")
    folder, output, settings = tmp_path / "books", tmp_path / "records.jsonl", tmp_path / "settings.toml"
    folder.mkdir()
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(60)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    settings.write_text(
        "[retention]\ncontext_tokens = 16\nsync_tokens = 32\npassage_tokens = 16\n[ttt]\nscale = 0.25\n"
    )
    flags = ["--data-dir", folder, "--output", output, "--rounds", "1", "--streams", "2", "--config", settings]
    assert run(["bench", "retention", "mine", "ttt", *map(str, flags), "--model", "tiny"]) == 0
    records = read_records(output)
    assert {record.method for record in records} == {"mine", "ttt", "truncation"}  # and what they are compared with
    assert {record.config["method"].get("scale") for record in records} == {None, 0.25}
