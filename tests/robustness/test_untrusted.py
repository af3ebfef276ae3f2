"""Crafted files run no code: a part of `python -m tests.robustness.untrusted`."""

import ast
from pathlib import Path

import keras
import pytest

import keras_moe
from tests.robustness import payloads, untrusted

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="files are read by Keras alone"
)


@pytest.fixture(scope="module")
def watch():
    return untrusted.Watch()


def test_crafted_files_run_no_code(watch):
    chosen = untrusted.cases(60)
    assert len(chosen) >= 30
    outcomes = [untrusted.attempt(case, watch) for case in chosen]
    wrong = [
        f"{case[0]}: {found}"
        for case, (_, found) in zip(chosen, outcomes, strict=True)
        if found
    ]
    assert not wrong, wrong


def test_files_that_nobody_changed_load(watch):
    for kind, model in untrusted.models().items():
        archive = untrusted.Archive(model)

        def write(file, target, archive=archive):
            archive.write(file)

        assert untrusted.attempt((kind, write), watch) == ("loaded", None)


def test_code_is_seen_where_safe_mode_is_off(watch):
    """The payloads would run, and the watch would see them."""
    model = keras.Sequential([keras.Input((6,)), keras_moe.layers.MoE(2, 3)])
    archive = untrusted.Archive(model)
    path = next(p for p in untrusted.slots(archive.config) if p[-1] == "activation")

    def write(file, target):
        code = payloads.PAYLOADS["marshalled lambda"](target)
        archive.write(file, untrusted._with(archive.config, path, code))

    assert untrusted.attempt(("activation", write), watch) == ("refused", None)
    _, wrong = untrusted.attempt(("activation", write), watch, safe_mode=False)
    assert "marshal.loads" in wrong


@pytest.mark.parametrize("what", ["write", "read", "remove", "change"])
def test_what_a_load_does_outside_is_seen(watch, what, monkeypatch, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("a")
    found = {}

    def load(file, safe_mode):
        secret = found["target"].secret
        if what == "write":
            kept.write_text("b")
        elif what == "read":
            secret.read_text()
        elif what == "remove":
            kept.unlink()
        else:  # as C does it, which Python does not report: of the same length
            with watch.unseen():
                secret.write_text(secret.read_text()[::-1])

    def write(file, target):
        found["target"] = target

    monkeypatch.setattr(keras.saving, "load_model", load)
    outcome, wrong = untrusted.attempt(("a case", write), watch)
    assert outcome == "loaded"
    expected = {
        "write": f"open of {kept}",
        "read": f"open of {found['target'].secret}",
        "remove": f"os.remove of {kept}",
        "change": "wrote ['private/secret.txt']",
    }
    assert expected[what] in wrong


FORBIDDEN = {"eval", "exec", "compile", "__import__", "enable_unsafe_deserialization"}


def test_the_library_makes_no_object_of_text():
    """Objects of configs come from Keras, in the mode that the caller chose."""
    for path in Path(keras_moe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert not names & {"pickle", "marshal", "dill", "shelve"}, path
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in FORBIDDEN, path
                assert all(word.arg != "safe_mode" for word in node.keywords), path
                if getattr(node.func, "attr", "") == "import_module":
                    written = isinstance(node.args[0], ast.Constant)
                    # Of names in the source, which `_tpu.py` has in a constant.
                    assert written or path.name == "_tpu.py", path
