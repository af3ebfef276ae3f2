"""The documentation: the code of its pages runs, its site builds without a warning."""

import importlib
import importlib.util
import re
from pathlib import Path

import keras
import pytest

import keras_moe
from tests.support import processes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if path.parent.name not in ("api", "generated")
)
# A comment before a block of code says where it runs, if not in the page's namespace.
BLOCK = re.compile(
    r"(?:^<!-- (?P<how>run apart|not run): [^\n]* -->\n)?^```python\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the pages export and use tf.data"
)


def blocks(page, how):
    return [m["code"] for m in BLOCK.finditer(page.read_text()) if m["how"] == how]


def name_of(page):
    return str(page.relative_to(DOCS).with_suffix(""))


@on_tensorflow
@pytest.mark.filterwarnings("ignore:In the future `np:FutureWarning")  # of tf2onnx
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, None)], ids=name_of
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, code in enumerate(blocks(page, None), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@on_tensorflow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "run apart")], ids=name_of
)
def test_the_code_that_needs_its_own_process_runs(page):
    if importlib.util.find_spec("tensorflow_recommenders") is None:
        pytest.skip("tensorflow-recommenders is not installed")
    code = "\n".join(blocks(page, "run apart"))
    done = processes.run(["-c", code], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@on_tensorflow
def test_the_site_builds_without_a_warning(tmp_path):
    """A broken link, and a public name without a docstring, are warnings."""
    for package in ("sphinx", "myst_parser", "furo", "tf_keras"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    arguments = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "docs"]
    done = processes.run(["-m", "sphinx", *arguments, str(tmp_path / "site")], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]

    pages = _extension("pages")
    for module in pages.MODULES:
        if module == "tfrs":
            continue  # Sets what tf.keras is for this process.
        html = (tmp_path / "site" / "api" / f"{module}.html").read_text()
        for name in pages.public_names(importlib.import_module(f"keras_moe.{module}")):
            full = f"keras_moe.{module}.{name}"
            assert f'id="{full}"' in html or f">{name}<" in html, full
    html = (tmp_path / "site" / "api" / "tfrs.html").read_text()
    assert 'id="keras_moe.tfrs.LegacyLayer"' in html
    for path in (tmp_path / "site").rglob("*.html"):
        assert not re.search(
            r'(?:src|<link[^>]*href)="(?:https?:)?//', path.read_text()
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_in_the_repository_too(page):
    """Sphinx checks the links of the site, where files out of `docs/` have pages."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_site_has_a_page_for_every_module():
    public = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "keras_moe").iterdir()
        if not path.name.startswith("_")
    }
    modules = {module for module in _extension("pages").MODULES if "." not in module}
    assert modules == public - {"py"}


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {keras_moe.__version__}\n" in citation


def test_the_picture_is_that_of_its_script():
    picture = DOCS / "figures" / "architecture.svg"
    spec = importlib.util.spec_from_file_location(
        "architecture", picture.with_suffix(".py")
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.picture() == picture.read_text()


def _extension(name):
    path = DOCS / "_extensions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
