"""Tests of the shape of the repository, read from its sources with `ast`: imports, lengths, names and banned modules.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import collections
import functools
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora_lite"

# The rooms by floor. A file imports from its own room, from rooms on lower floors and from the ground; a room inside
# another one may import from that one too.
FLOORS: dict[str, int] = {
    "": 0,  # the ground: the files beside the rooms
    "progress": 0,
    "compute.products": 0,
    "compute": 1,
    "offload": 1,
    "quantization": 2,
    "sharding": 2,
    "checkpoints.layouts": 3,
    "checkpoints.repository": 3,
    "checkpoints.shares": 3,
    "checkpoints": 4,
    "choosing": 5,
    "lora": 5,
    "lora.peft": 5,
    "data.chat": 5,
    "data.images": 5,
    "data.sources": 5,
    "data": 6,
    "data.tasks": 6,
    "memory": 6,
    "memory.drawing": 6,
    "export": 7,
    "export.gguf": 7,
    "export.publishing": 7,
    "generation": 7,
    "training.objective": 7,
    "calibration": 8,
    "export.readers": 8,
    "serving": 8,
    "training.forward": 8,
    "training": 9,
    "planning": 10,
    "integrations": 10,
    "reports": 10,
    "cli.training": 11,
    "cli.generation": 11,
    "cli.configuration": 12,
    "cli": 13,
}

# Which files may import a library, wherever in the file the import stands.
KEEPERS = {
    "transformers": {
        "checkpoints.hub",
        "checkpoints.conversion",
        "patches",
        "integrations.transformers",
    },
    "bitsandbytes": {"quantization.kernels", "training.optim"},
    "accelerate": {"training.step", "integrations.trackers"},
    "peft": {
        "integrations.peft",
        "integrations.peft_config",
        "integrations.peft_embedding",
        "integrations.peft_experts",
        "integrations.peft_linear",
        "integrations.peft_merging",
    },
    "trl": {"integrations.trl"},
    "matplotlib": {"memory.drawing.png"},
    "pyarrow": {"data.sources.arrow_tables"},
    "PIL": {"data.images.processor"},
    "datasets": {"data.sources.hub_dataset"},
    "filelock": {"system"},
    "gguf": {"export.gguf.library"},
    "fastapi": {"serving.app"},
    "uvicorn": {"serving.server"},
    "yaml": {"cli.configuration.yaml_text"},
}
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

MAX_FILE_LINES = 350
MAX_ROOM_FILES = 12
MAX_FUNCTION_LINES = 50
FORBIDDEN_FILE_WORDS = {"util", "utils", "helper", "helpers", "manager", "managers", "handler", "handlers"}
FORBIDDEN_FUNCTION = re.compile(r"_*(process|do)_")
WITHOUT_MIRROR = {"errors.py", "__init__.py", "__main__.py"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """One imported dotted name; `place` is `module`, `function` or `typing` (under TYPE_CHECKING)."""

    target: str
    line: int
    place: str


def python_files(*folders: str) -> list[Path]:
    """Every .py file below these folders of the repository, in order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def script_files() -> list[Path]:
    """Programs that are run by path, and their parts."""
    checks = [path for path in python_files("tests/interop", "tests/reliability") if not path.name.startswith("test_")]
    return python_files("examples", "profiling") + checks


def code_files() -> list[Path]:
    return python_files("qlora_lite") + script_files()


def shown(path: Path) -> str:
    """The path as messages have it: from the repository's root, with slashes."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """`qlora_lite/memory/trace.py` -> `memory.trace`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def documented(node: ast.AST) -> bool:
    """Whether the first statement of a module, class or function is its docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(syntax(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def last_name(node: ast.expr) -> str:
    """`a.b.c` -> `c`; anything that is no name -> the empty string."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def imported_names(node: ast.AST) -> Iterator[str]:
    """The dotted names that one syntax node imports; `from a import b` gives `a.b`.

    A call of anything named `…import…` with a string first (`importlib.import_module("x")`) is an import too.
    Relative imports are banned by ruff.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and "import" in last_name(node.func):
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def walk_imports(node: ast.AST, place: str) -> Iterator[Import]:
    yield from (Import(target, getattr(node, "lineno", 0), place) for target in imported_names(node))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        place = "function"
    guarded = isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING"
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk_imports(child, "typing" if guarded and field == "body" else place)


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(walk_imports(syntax(path), "module"))


def own_module(target: str) -> str | None:
    """The file of the package that a dotted name comes from: `qlora_lite.lora.config.LoraConfig` -> `lora.config`.

    The empty string for what comes from a face (the door or a room's `__init__`); None for what is not ours.
    """
    parts = target.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for end in range(len(parts), 1, -1):
        if PACKAGE.joinpath(*parts[1:end]).with_suffix(".py").is_file():
            return ".".join(parts[1:end])
    return ""


def output_of(code: str) -> str:
    """What a Python process of its own prints, on both streams; fails with it unless the process ends well."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def report(what: str, offenders: list[str]) -> None:
    """Fails with every offender on a line of its own, if there are any."""
    if offenders:
        pytest.fail("\n  ".join([f"{what}:", *dict.fromkeys(offenders)]), pytrace=False)


def package_files() -> dict[str, Path]:
    """Every file of the package by its module's name, doors left out."""
    return {module_name(path): path for path in python_files("qlora_lite") if path.name != "__init__.py"}


def room_of(module: str) -> str:
    """`memory.drawing.page` -> `memory.drawing`; the ground is the empty string."""
    return module.rpartition(".")[0]


def may_import(room: str, other: str) -> bool:
    return other == room or FLOORS[other] < FLOORS[room] or room.startswith(f"{other}.")


def imports_of_files() -> Iterator[tuple[str, Import, str]]:
    """(file, import, imported file) for each import of one file of the package by another; faces are imported `""`."""
    for name, path in package_files().items():
        for found in imports(path):
            other = own_module(found.target)
            if other is not None:
                yield name, found, other


def test_every_room_is_on_a_floor() -> None:
    rooms = {room_of(name) for name in package_files()}
    assert rooms == set(FLOORS)


def test_rooms_import_from_lower_floors() -> None:
    offenders = [
        f"{name}:{found.line} ({found.place}) imports {other}"
        for name, found, other in imports_of_files()
        if other and not may_import(room_of(name), room_of(other))
    ]
    report("imports that do not point to a lower floor", offenders)


def test_files_import_from_files() -> None:
    """Faces are for users. A file that imported from its room's face would import the whole room in its place."""
    offenders = [
        f"{name}:{found.line} ({found.place}) imports {found.target} from a face"
        for name, found, other in imports_of_files()
        if not other
    ]
    report("files of the package that import from a face", offenders)


def test_no_circle_of_files() -> None:
    below: dict[str, set[str]] = {}
    for name, _, other in imports_of_files():
        below.setdefault(name, set()).add(other)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}", pytrace=False)


def test_rooms_are_small() -> None:
    sizes = collections.Counter(room_of(name) for name in package_files() if not name.endswith("__main__"))  # a door
    offenders = [f"{room}: {count} files" for room, count in sizes.items() if count > MAX_ROOM_FILES]
    report(f"rooms of more than {MAX_ROOM_FILES} files", offenders)


def unwanted_imports(paths: list[Path], unwanted: Callable[[str], bool]) -> list[str]:
    return [
        f"{shown(path)}:{line} ({place}) imports {target}"
        for path in paths
        for target, line, place in imports(path)
        if unwanted(target)
    ]


def test_package_imports_nothing_from_above_it() -> None:
    above = {"profiling", "examples", "tests", *(path.stem for path in script_files())}
    offenders = unwanted_imports(python_files("qlora_lite"), lambda target: target.split(".")[0] in above)
    report("the package imports scripts or tests", offenders)


@pytest.mark.parametrize("library", KEEPERS)
def test_library_is_imported_by_its_keepers_alone(library: str) -> None:
    others = [path for path in python_files("qlora_lite") if module_name(path) not in KEEPERS[library]]
    offenders = unwanted_imports(others, lambda target: target.split(".")[0] == library)
    report(f"only {', '.join(sorted(KEEPERS[library]))} may import {library}", offenders)


def faces() -> dict[str, Path]:
    """The `__init__.py` of every room by the room's name; the door is the empty string."""
    files = [path for path in python_files("qlora_lite") if path.name == "__init__.py"]
    return {".".join(path.parent.relative_to(PACKAGE).parts): path for path in files}


def test_faces_import_nothing_but_the_lazy_mechanism() -> None:
    """Names for type checkers aside: importing a room has to cost nothing."""
    allowed = {"__future__.annotations", "typing.TYPE_CHECKING", "qlora_lite.lazy.lazy_names"}
    offenders = [
        f"{shown(path)}:{found.line} imports {found.target}"
        for path in faces().values()
        for found in imports(path)
        if found.place != "typing" and found.target not in allowed
    ]
    report("faces that import more than they need", offenders)


def test_faces_name_every_file_of_their_room() -> None:
    offenders = []
    for room, path in faces().items():
        listed = set(re.findall(r"^(\w+) {2,}\S", ast.get_docstring(syntax(path)) or "", flags=re.MULTILINE))
        files = {file.stem for file in path.parent.glob("*.py") if room and file != path}
        offenders += [f"{shown(path)} does not name {name}" for name in sorted(files - listed)]
        offenders += [f"{shown(path)} names {name}, which does not exist" for name in sorted(listed - files)]
    report("faces that do not list their files", offenders)


def test_faces_give_type_checkers_the_names_that_they_give_at_run_time() -> None:
    offenders = []
    for room, path in faces().items():
        package = ".".join(["qlora_lite", room]).rstrip(".")
        declared = {found.target for found in imports(path) if found.place == "typing"}
        face = importlib.import_module(package)
        names = getattr(face, "__all__", [])
        homes = {f"{package}.{name}": getattr(face, name) for name in names}
        assert len(declared) == len(homes), f"{package}: {sorted(declared)} declared, {sorted(homes)} handed on"
        for target in declared:
            module, _, name = target.rpartition(".")
            if homes.get(f"{package}.{name}") is not getattr(importlib.import_module(module), name):
                offenders.append(f"{shown(path)}: {target}")
    report("names that a face declares and does not hand on", offenders)


def test_public_names_are_no_files_of_their_room() -> None:
    """Importing `room/name.py` would replace a public name `room.name` by the module."""
    offenders = [
        f"{shown(path)}: {name}"
        for room, path in faces().items()
        for name in getattr(importlib.import_module(".".join(["qlora_lite", room]).rstrip(".")), "__all__", [])
        if (path.parent / f"{name}.py").is_file() or (path.parent / name).is_dir()
    ]
    report("public names that are also files", offenders)


def test_examples_import_from_faces() -> None:
    offenders = [
        f"{shown(path)}:{found.line} imports {found.target}"
        for path in python_files("examples")
        for found in imports(path)
        if own_module(found.target) not in (None, "", "errors", "integrations.trl")  # it has trl's own names
    ]
    report("examples that import from below a face", offenders)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in code_files()}
    offenders = [f"{shown(path)}: {lines}" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    report(f"files of more than {MAX_FILE_LINES} lines", offenders)


def function_lines(function: Function) -> int:
    """Lines of the body, the docstring not counted. Options of a command are a table: its signature does not count."""
    doc = function.body[0]
    doc_lines = (doc.end_lineno or doc.lineno) - doc.lineno + 1 if documented(function) else 0
    return (function.end_lineno or doc.lineno) - doc.lineno + 1 - doc_lines


def test_functions_are_short() -> None:
    offenders = [
        f"{shown(path)}:{function.lineno} {function.name}: {function_lines(function)}"
        for path in code_files()
        for function in functions(path)
        if function_lines(function) > MAX_FUNCTION_LINES
    ]
    report(f"functions of more than {MAX_FUNCTION_LINES} lines", offenders)


def cuda_mentions(path: Path) -> Iterator[int]:
    """Lines with a string that names the device, or an attribute or import of torch.cuda; docstrings are prose."""
    prose = {id(node.body[0].value) for node in ast.walk(syntax(path)) if documented(node)}  # type: ignore[attr-defined]
    for node in ast.walk(syntax(path)):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
        named = isinstance(text, str) and re.search(r"\bcuda\b", text)
        if named or (isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda")):
            yield node.lineno  # type: ignore[attr-defined]
    yield from (line for target, line, _ in imports(path) if re.match(r"torch\.cuda\b", target))


def test_no_device_is_named_outside_memory() -> None:
    offenders = [
        f"{shown(path)}:{line}"
        for path in code_files()
        if not path.is_relative_to(PACKAGE / "memory")
        for line in sorted(set(cuda_mentions(path)))
    ]
    report("'cuda' or torch.cuda outside qlora_lite/memory/", offenders)


def test_profiling_is_no_package() -> None:
    offenders = [shown(path) for path in python_files("profiling") if path.name == "__init__.py"]
    report("profiling/ would shadow the standard library's package of that name", offenders)


def test_scripts_shadow_no_standard_module() -> None:
    offenders = [shown(path) for path in script_files() if path.stem in sys.stdlib_module_names]
    report("scripts named after a module of the standard library", offenders)


def test_scripts_have_different_names() -> None:
    """They import one another by name, and the tests import them into one process."""
    named = collections.Counter(path.stem for path in script_files())
    report("scripts of one name", [shown(path) for path in script_files() if named[path.stem] > 1])


DOOR_CODE = """
import sys
import qlora_lite
names = {name: getattr(qlora_lite, name) for name in qlora_lite.__all__}
import torch
assert names, "qlora_lite.__all__ is empty"
assert "transformers" not in sys.modules, "transformers was imported"
assert "torch._inductor.compile_fx" not in sys.modules, "torch's compiler was imported"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
"""


def test_door_opens_quietly_and_without_transformers() -> None:
    assert output_of(DOOR_CODE) == ""


DOOR_AFTER_MODULES_CODE = """
import importlib, types
for name in {modules!r}:
    importlib.import_module("qlora_lite." + name)
import qlora_lite
print(*[name for name in qlora_lite.__all__ if isinstance(getattr(qlora_lite, name), types.ModuleType)])
"""


def test_door_gives_the_same_whatever_was_imported_before() -> None:
    printed = output_of(DOOR_AFTER_MODULES_CODE.format(modules=sorted(package_files())))
    report("names of the door that become modules once a file of that name is imported", printed.split())


def test_files_are_named_for_what_they_hold() -> None:
    everywhere = python_files("qlora_lite", "profiling", "examples", "tests")
    offenders = [shown(path) for path in everywhere if FORBIDDEN_FILE_WORDS & set(path.stem.split("_"))]
    report("file names that say nothing", offenders)


def test_functions_are_named_for_what_they_give() -> None:
    offenders = [
        f"{shown(path)}:{function.lineno} {function.name}"
        for path in python_files("qlora_lite", "profiling", "examples", "tests")
        for function in functions(path)
        if FORBIDDEN_FUNCTION.match(function.name)
    ]
    report("functions named process_* or do_*", offenders)


def test_every_file_has_its_mirror() -> None:
    missing = []
    for path in python_files("qlora_lite"):
        mirror = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
        if path.name not in WITHOUT_MIRROR and not mirror.is_file():
            missing.append(f"{shown(path)} wants {shown(mirror)}")
    report("files without tests", missing)


def test_nothing_reads_or_writes_a_pickle() -> None:
    pickles = {"torch.load", "torch.save"}
    files = python_files("qlora_lite")
    offenders = unwanted_imports(files, lambda target: target in pickles or target.split(".")[0] in PICKLERS)
    for path in files:
        attributes = [node for node in ast.walk(syntax(path)) if isinstance(node, ast.Attribute)]
        calls = [(node.lineno, f"{last_name(node.value)}.{node.attr}") for node in attributes]
        offenders += [f"{shown(path)}:{line} uses {call}" for line, call in calls if call in pickles]
    report("pickles", offenders)


class TreeEntry(NamedTuple):
    """A line of the README's tree: the path it names from the root (folders end in a slash), and its comment."""

    path: str
    comment: str


def readme_tree(readme: str) -> list[TreeEntry]:
    """The entries of the first fenced block that has a line starting with `qlora_lite/`.

    Two spaces of indentation are one level; a name is followed by two or more spaces and a comment.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    tree = next((block for block in blocks if re.search(r"^qlora_lite/", block, flags=re.MULTILINE)), None)
    assert tree is not None, "README.md has no fenced block with a line that starts with qlora_lite/"
    entries: list[TreeEntry] = []
    above: list[str] = []
    for line in filter(str.strip, tree.splitlines()):
        match = re.fullmatch(r"((?:  )*)(\S+)(?: {2,}(\S.*))?", line)
        assert match, f"a line of the README's tree is not `name  comment`: {line!r}"
        depth = len(match[1]) // 2
        assert depth <= len(above), f"a line of the README's tree is in no folder: {line!r}"
        above[depth:] = [match[2]] if match[2].endswith("/") else []
        folder = "".join(above[:depth])
        entries.append(TreeEntry(folder + match[2], match[3] or ""))
    return entries


def test_readme_tree_names_every_room() -> None:
    entries = readme_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    named = [entry.path for entry in entries]
    offenders = [f"{name} is named twice" for name in sorted(set(named)) if named.count(name) > 1]
    for name in named:
        there = (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()
        offenders += [] if there else [f"{name} is named and does not exist"]
    folders = {f"{shown(path.parent)}/" for path in code_files()}
    offenders += [f"{folder} is not named" for folder in sorted(folders) if folder not in named]
    offenders += [f"{name} has no comment" for name, comment in entries if not comment]
    report("README.md's tree and the disk disagree", offenders)
