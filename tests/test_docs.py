"""The README and the pages of docs/: their code runs, and their commands and files exist."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn

import gradfuse
from gradfuse.__main__ import main as command_line

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
STEMS = ("clip", "adaptive_clip", "batch_norm", "row_norm", "optim")


def surroundings() -> dict[str, Any]:
    """The names that a block may use: a model, its data, a loss before its backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(2)]
    loss_fn = nn.functional.cross_entropy
    return {
        "model": model,
        "batches": batches,
        "loss_fn": loss_fn,
        "loss": loss_fn(model(batches[0][0]), batches[0][1]),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "x": torch.randn(2, 64, 5, 5),
        "residual": torch.randn(2, 64, 5, 5),
    }


def blocks(parser: Callable) -> list[Any]:
    return [
        pytest.param(example, id=f"{path.relative_to(ROOT)}:{example.line}")
        for path in PAGES
        for example in Document.parse(str(path), parser).examples()
    ]


def torchvision() -> types.SimpleNamespace:
    """A stand-in with the one name that diffs use. It makes a ResNet-18, which takes a tenth of a
    second; a ResNet-50 takes a second."""
    models = pytest.importorskip("torchvision").models
    return types.SimpleNamespace(models=types.SimpleNamespace(resnet50=models.resnet18))


@pytest.mark.parametrize("block", blocks(PythonCodeBlockParser()))
def test_python_block(block: Example) -> None:
    """Each block runs by itself. It imports what it needs besides its surroundings."""
    if "torchvision" in block.parsed:
        pytest.importorskip("torchvision")
    block.namespace.clear()
    block.namespace.update(surroundings())
    block.evaluate()


@pytest.mark.parametrize("side", ["-", "+"])
@pytest.mark.parametrize("block", blocks(CodeBlockParser("diff", lambda example: None)))
def test_diff(block: Example, side: str) -> None:
    """Both sides run: the reader's code before the change and after it."""
    lines = [line for line in block.parsed.splitlines() if line[:1] in (side, " ", "")]
    # The names that a diff uses and does not define, because the code around it does.
    namespace = {**surroundings(), "torch": torch, "gradfuse": gradfuse}
    if "torchvision" in block.parsed:
        namespace["torchvision"] = torchvision()
    exec("\n".join(line[1:] for line in lines), namespace)


def commands(pattern: str) -> dict[str, str]:
    """The matches of the pattern's group in code, with page and line of each one's first place."""
    found: dict[str, str] = {}
    for path in PAGES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
            for match in re.finditer(pattern, "\n".join(code), re.MULTILINE):
                found.setdefault(match[1].strip(), f"{path.relative_to(ROOT)}:{number}")
    return found


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = commands(r"^\s*make (?:-j\d+ )?([\w-]+)")
    assert {"demo", "test", "wheel"} <= named.keys()
    assert {name: where for name, where in named.items() if name not in targets} == {}


@pytest.mark.parametrize(
    "command",
    sorted(commands(r"^\s*python -m gradfuse ([^#\n]+)")),
    ids=lambda c: c.replace(" ", "_"),
)
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(extra)
    arguments = command.split()
    if arguments == ["info"]:
        assert command_line(arguments) == 0
        return
    shown = ""
    for line in (arguments, arguments[:1]):
        with pytest.raises(SystemExit) as stopped:
            command_line([*line, "--help"])
        assert stopped.value.code == 0
        shown += capsys.readouterr().out
    assert {word for word in arguments[1:] if word not in shown} == set()


def test_files_exist() -> None:
    """Paths of the checkout in code. <stem> stands for the stem of any op."""
    found = commands(r"^((?:csrc|gradfuse|tests|docs|bench|examples|\.ci|\.github)/[\w./<>-]*)$")
    assert "csrc/ops/<stem>.h" in found
    missing = {
        path: where
        for path, where in found.items()
        if not any((ROOT / path.replace("<stem>", stem)).exists() for stem in STEMS)
    }
    assert missing == {}


def test_links_lead_somewhere() -> None:
    """Links of the files that mkdocs does not read. mkdocs checks those of docs/."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target, anchor in re.findall(r"\]\(([^)#:]+)(#[^)]*)?\)", path.read_text()):
            assert (ROOT / target).exists(), f"{path.name}: {target}"
            if anchor:
                assert anchor[1:] in anchors((ROOT / target).read_text()), f"{path.name}: {anchor}"


def anchors(page: str) -> set[str]:
    """The anchors that GitHub and mkdocs give to headings of plain words."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_tables_are_whole() -> None:
    """Each row has as many cells as the table's header, and no blank line cuts one off."""
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [re.sub(r"`[^`]*`|\\\|", "", row).count("|") for row in table.splitlines()]
            assert len(rows) > 2, f"{path.name}: {table}"
            assert set(rows) == {rows[0]}, f"{path.name}: {table}"
            assert re.fullmatch(r"\|( ?-+:? ?\|)+", table.splitlines()[1]), f"{path.name}: {table}"


def found_by_mkdocstrings(path: str) -> object:
    """The object that mkdocstrings shows. It prefers a module: gradfuse.fuse is the module."""
    for at in (m.start() for m in reversed(list(re.finditer(r"\.|$", path)))):
        try:
            importlib.import_module(path[:at])
        except ModuleNotFoundError:
            continue
        found: object = sys.modules[path[:at]]
        for name in path[at:].split(".")[1:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


REFERENCE = [
    (found_by_mkdocstrings(path), re.findall(r"\w+", members))
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for path, members in re.findall(
        r"^::: ([\w.]+)$(?:\n    options:\n(?:      (?!members).*\n)*      members: \[([^\]]*)\])?",
        page.read_text(),
        re.MULTILINE,
    )
]


PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (
        gradfuse,
        gradfuse.curriculum,
        gradfuse.init,
        gradfuse.nn,
        gradfuse.optim,
        gradfuse.policies,
    )
    for name in module.__all__
}


@pytest.mark.parametrize(("name", "value"), PUBLIC.items(), ids=PUBLIC.keys())
def test_public_name_has_a_reference_page(name: str, value: object) -> None:
    assert any(value is shown for shown, _ in REFERENCE), f"add ::: {name} to docs/reference/"
    # The docstring must be in the source: mkdocstrings imports nothing, so it does not see one that
    # is made at run time, and would show the name without text.
    source = inspect.getsource(value)  # type: ignore[arg-type]
    own = inspect.getdoc(value)
    assert own, name
    assert own.splitlines()[0] in source, name


def test_members_of_the_reference_exist() -> None:
    assert sum(len(members) for _, members in REFERENCE) > 20
    assert [m for value, members in REFERENCE for m in members if not hasattr(value, m)] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_citation_is_of_this_version() -> None:
    version = f"version: {gradfuse.__version__}\n"
    assert version in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{gradfuse.__version__}}}" in (ROOT / "README.md").read_text()


def test_traffic_has_its_places() -> None:
    traffic = pytest.importorskip("ptx.traffic")
    page = (ROOT / "docs" / "cuda.md").read_text()
    for name in traffic.TABLES:
        filled = traffic.with_table(page, name, "a table")
        assert f"-->\n\na table\n\n<!-- end of {name} -->" in filled
        assert len(filled) < len(page)
    with pytest.raises(ValueError, match="expected '<!-- steps"):
        traffic.with_table("a page without", "steps", "a table")
