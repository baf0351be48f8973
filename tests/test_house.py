"""The house: how much a reader has to read, what imports what, and that every import is a requirement."""

import ast
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL_FLAGS, ROOT

PATH = ["errors", "manifest", "dataset", "model", "recognize", "train", "score", "hallucination"]  # what one reads


def run_and_list_files(script: str, flags: str, folder: str, log: str) -> None:
    """In a new process, from which our modules are taken out: run a command, and list our files that it has loaded."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT:
            del sys.modules[name]
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [script, *flags.split()]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        runpy.run_path(script, run_name="__main__")
    files = {Path(getattr(module, "__file__", None) or "/") for module in sys.modules.values()} | {Path(script)}
    Path(f"{log}.files").write_text("\n".join(path.stem for path in files if path.parent == ROOT))


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, inside_functions: bool = True) -> set[str]:
    """Top-level names of the modules that a file imports at run time: at once, and, if asked, inside its functions."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            names.add(child.module.partition(".")[0])
        elif isinstance(child, ast.FunctionDef) and not inside_functions:
            continue
        elif not is_type_checking(child):
            names |= imports(child, inside_functions)
    return names


FILES = sorted(path.stem for path in ROOT.glob("*.py"))
OPTIONS = [name for name in FILES if name not in PATH]


@pytest.fixture(scope="module")
def loaded(world, trained, launch, tmp_path_factory) -> dict[str, list[str]]:
    """Our files that the two commands load, each in a process of its own."""
    folder = tmp_path_factory.mktemp("reading")
    training = f"{MODEL_FLAGS} --data_path corpus.jsonl --output_dir {folder}/run --use_cpu --max_steps 2"
    decoding = f"--model_path trained --data_path corpus.jsonl --result_path {folder}/result.txt --max_new_tokens 4"
    files = {}
    for script, flags in (("train", f"{training} --report_to none"), ("recognize", decoding)):
        log = folder / script
        args = str(ROOT / f"{script}.py"), flags, str(world), str(log)
        process = multiprocessing.get_context("forkserver").Process(target=run_and_list_files, args=args)
        process.start()
        process.join(120)
        assert process.exitcode == 0, log.read_text()
        files[script] = sorted(Path(f"{log}.files").read_text().splitlines())
    return files


def test_training_and_decoding_load_the_eight_files_of_the_reading_path_and_no_option(loaded):
    assert set(loaded["train"]) == set(PATH) - {"recognize", "score", "hallucination"}
    assert set(loaded["recognize"]) == set(PATH) - {"train"}


@pytest.mark.parametrize("script", ["train", "recognize"])
def test_what_a_command_loads_is_read_in_an_hour(loaded, script):
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in loaded[script]}
    assert sum(lines.values()) <= 2000, lines


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gets_values_and_never_imports_what_uses_it(name):
    assert not imports(parse(name)) & {"model", "recognize", "train"}


def test_an_option_is_imported_where_its_flag_is_met():
    for name in PATH:
        assert not imports(parse(name), inside_functions=False) & set(OPTIONS), f"{name}.py loads an option at once"


def test_imports_never_circle_inside_functions_either():
    graph = {name: imports(parse(name)) & set(FILES) for name in FILES}
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"these import each other: {left}"


def test_the_root_never_imports_a_program():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"demo", "tools", "recipes"} <= folders | {path.name for path in ROOT.iterdir() if path.is_dir()}
    for name in FILES:
        assert not imports(parse(name)) & {"demo", "tools", "recipes", "tests"}


@pytest.mark.parametrize("name", FILES)
def test_methods_are_written_in_their_class(name):
    """Nothing becomes a method by assignment from another file."""
    modules = imports(parse(name)) & set(FILES)
    for part in ast.walk(parse(name)):
        for line in part.body if isinstance(part, ast.ClassDef) else []:
            values = ast.walk(line.value) if isinstance(line, ast.Assign) else []
            assert not [v for v in values if isinstance(v, ast.Name) and v.id in modules], ast.unparse(line)


def test_all_that_is_imported_stands_in_the_requirements():
    packages = {"yaml": "pyyaml", "whisper": "openai-whisper"}
    text = (ROOT / "requirements.txt").read_text()
    required = {re.split(r"[=<>!~; ]", line)[0].lower() for line in text.splitlines() if line and line[0].isalpha()}
    optional = {"bitsandbytes", "datasets", "lhotse", "pyarrow", "silero_vad"}  # messages say how to install them
    for name in FILES:
        foreign = imports(parse(name)) - set(FILES) - set(sys.stdlib_module_names) - optional
        missing = {packages.get(module, module.replace("_", "-")) for module in foreign} - {
            package.replace("_", "-") for package in required
        }
        assert not missing, f"{name}.py imports {missing}"


def test_minor_versions_are_pinned_where_private_hooks_are_used():
    text = (ROOT / "requirements.txt").read_text()
    for package in ("transformers", "deepspeed"):
        assert re.search(rf"^{package}>=[\d.]+,<\d+\.\d+\b", text, re.MULTILINE), package


def test_the_readmes_name_files_that_exist():
    for readme in (ROOT / "README.md", *ROOT.glob("recipes/*/README.md")):
        names = re.findall(r"`((?:tests|tools|demo|recipes)/[\w./]*|\w+\.py)`", readme.read_text())
        assert len(names) > 1 or readme.parent != ROOT
        assert not [name for name in names if not (ROOT / name).exists()], readme
