"""Which texts are names of repositories, and where a checkpoint came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from vila_deploy.checkpoint.hub import HubSource, checkpoint_name, hub_source, original_source
from vila_deploy.checkpoint.hub.name import HubName, hub_name
from vila_deploy.utils.errors import VilaDeployError

MODEL = "Efficient-Large-Model/VILA1.5-3b"
COMMIT = "0123abcd" * 5


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        (MODEL, MODEL, None),
        (f"{MODEL}/", MODEL, None),
        (f"{MODEL}@v1.0", MODEL, "v1.0"),
        (f"{MODEL}@refs/pr/1", MODEL, "refs/pr/1"),
        (f"{MODEL}@{COMMIT}", MODEL, COMMIT),
        (f"hf://{MODEL}", MODEL, None),
        (f"hf://{MODEL}@main", MODEL, "main"),
        (f"https://huggingface.co/{MODEL}", MODEL, None),
        (f"https://huggingface.co/{MODEL}/tree/refs/pr/1", MODEL, "refs/pr/1"),
        ("a/b", "a/b", None),
    ],
)
def test_names(text: str, repository: str, revision: str | None) -> None:
    assert hub_name(text) == hub_name(Path(text)) == HubName(repository, revision)


@pytest.mark.parametrize(
    "text",
    ["VILA1.5-3b", "./a/b", "../a/b", "/a/b", "a/b/c", "~/a", "", ".", "a/.b", "a/b.", "a--b/c",
     "a/b..c", "a/" + "b" * 100, "a b/c", "a/b@", "a/b@x y", "ä/b", "-a/b"],
)  # fmt: skip
def test_paths(text: str) -> None:
    assert hub_name(text) is None


@pytest.mark.parametrize(
    "text", ["hf://VILA1.5-3b", "hf://a/b/c", "https://huggingface.co/a", "hf://a--b/c@x"]
)
def test_what_begins_like_a_repository_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(VilaDeployError, match="OWNER/NAME"):
        hub_name(text)


def test_a_local_folder_of_that_name_wins(here: Path) -> None:
    (here / MODEL).mkdir(parents=True)
    assert hub_name(MODEL) is None
    assert hub_name(f"{MODEL}@main") == HubName(MODEL, "main")
    assert hub_name(f"hf://{MODEL}") == HubName(MODEL)
    (here / f"{MODEL}@main").mkdir()
    assert hub_name(f"{MODEL}@main") is None


def test_a_link_that_leads_nowhere_is_local_too(here: Path) -> None:
    (here / "Lab").mkdir()
    (here / "Lab" / "x").symlink_to("gone")
    assert hub_name("Lab/x") is None


def test_a_misspelled_folder_is_not_asked_for_on_the_hub(here: Path) -> None:
    (here / "out" / "vila-3b-awq").mkdir(parents=True)
    with pytest.raises(VilaDeployError) as raised:
        hub_name("out/vila-3b-aqw")
    assert "did you mean out/vila-3b-awq?" in str(raised.value)
    assert "hf://out/vila-3b-aqw" in str(raised.value)
    assert hub_name("out/something-else") == HubName("out/something-else")


def test_a_folder_of_the_cache_says_where_it_is_from(here: Path) -> None:
    folder = here / "models--Some-Lab--VILA1.5-3b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert hub_source(folder) == HubSource("Some-Lab/VILA1.5-3b", COMMIT)
    assert checkpoint_name(folder) == "VILA1.5-3b"
    assert hub_source(folder.parent) is None
    assert hub_source(folder / "llm") is None
    assert (hub_source(here), checkpoint_name(here)) == (None, here.name)


@pytest.mark.parametrize(
    ("report", "source"),
    [
        (f'{{"source": {{"repository": "a/b", "commit": "{COMMIT}"}}}}', HubSource("a/b", COMMIT)),
        ('{"source": null}', None),
        ('{"source": {"repository": "a/b", "commit": "../x"}}', None),
        (f'{{"source": {{"repository": "a\\u001b[2J/b", "commit": "{COMMIT}"}}}}', None),
        ('{"source": "a/b"}', None),
        ("no JSON", None),
    ],
)
def test_a_report_says_where_the_original_is_from(
    here: Path, report: str, source: HubSource | None
) -> None:
    (here / "report.json").write_text(report)
    assert original_source(here) == source
