# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The shape of the project: one arrow of imports, nothing stray in the wheel, a licence line everywhere."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gated_llama


ROOT = Path(__file__).parent.parent
TOP = ("configuration_gated", "configuration_gated_moe", "modeling_gated", "modeling_gated_moe")
# scripts → gated_llama → modeling_gated → configuration_gated: what each layer may import of the project.
MAY_IMPORT = {
    "configuration_gated.py": set(),
    "configuration_gated_moe.py": {"configuration_gated"},
    "modeling_gated.py": {"configuration_gated"},
    "modeling_gated_moe.py": {"configuration_gated_moe", "modeling_gated"},
    "gated_llama": {*TOP, "gated_llama"},
    "scripts": {*TOP, "gated_llama"},
}
OWN = {*TOP, "gated_llama", "scripts", "benchmarks", "tests", "tiny"}


def sources(layer: str) -> list[Path]:
    return [ROOT / layer] if layer.endswith(".py") else sorted((ROOT / layer).rglob("*.py"))


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def violations(layer: str, code: str) -> set[str]:
    own = {name for name in imported(ast.parse(code)) if name.split(".")[0] in OWN}
    wrong = {name for name in own if name.split(".")[0] not in MAY_IMPORT[layer]}
    if layer == "gated_llama":
        wrong |= {name for name in own if name.startswith("gated_llama.scripts")}
    return wrong


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_follow_the_arrow(layer):
    assert sources(layer)
    for path in sources(layer):
        assert not violations(layer, path.read_text()), path


def test_control_an_import_against_the_arrow_is_seen():
    assert violations("gated_llama", "from gated_llama.scripts.cli import main")
    assert violations("modeling_gated.py", "def f():\n    import gated_llama")


# Inside the package, from the floor up: a room imports of those before it, and its own files without a circle.
FLOORS = (
    {"errors"},
    {"checkpoints"},
    {"data", "gates", "runs"},
    {"adapters", "loading"},
    {"inspection"},
    {"conversion"},
    {"training"},
    {"sinks"},
    {"publish", "merge", "serve"},
)


def arrows() -> dict[str, set[str]]:
    """By module, such as `sinks.move`, the modules of the package that it imports, at its top or in a function."""
    found = {}
    for path in sources("gated_llama"):
        name = ".".join(path.relative_to(ROOT / "gated_llama").with_suffix("").parts).removesuffix(".__init__")
        targets = {name.removeprefix("gated_llama.") for name in imported(ast.parse(path.read_text()))}
        found[name] = {target for target in targets if (ROOT / "gated_llama" / target.replace(".", "/")).exists()}
        found[name] |= {
            target
            for target in targets
            if (ROOT / "gated_llama" / f"{target.replace('.', '/')}.py").exists() and target != "gated_llama"
        }
    return found


def upward(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

    def of(module: str) -> int:
        return floor[module.split(".")[0]]

    return {
        (module, target)
        for module, targets in arrows.items()
        for target in targets
        if of(target) > of(module) or (of(target) == of(module) and target.split(".")[0] != module.split(".")[0])
    }


def in_circles(arrows: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing that is left are taken away again and again."""
    left = {module: set(targets) for module, targets in arrows.items()}
    while done := {module for module, targets in left.items() if not targets & set(left)}:
        left = {module: targets for module, targets in left.items() if module not in done}
    return set(left)


def test_rooms_import_downward_and_in_no_circle():
    found = {module: targets for module, targets in arrows().items() if module != "__init__"}
    assert {module.split(".")[0] for module in found} == set().union(*FLOORS)
    assert sum(map(len, found.values())) > 50
    assert upward(found) == set() and in_circles(found) == set()


def test_control_an_arrow_upward_and_a_circle_are_seen():
    assert upward({"data": {"sinks.move"}, "gates": {"data"}}) == {("data", "sinks.move"), ("gates", "data")}
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c", "d"}


def test_the_top_files_import_what_they_may():
    for kind in ("gated", "gated_moe"):
        configuration = imported(ast.parse((ROOT / f"configuration_{kind}.py").read_text()))
        assert not any(name.split(".")[0] == "torch" for name in configuration)
        modeling = {name.split(".")[0] for name in imported(ast.parse((ROOT / f"modeling_{kind}.py").read_text()))}
        own = MAY_IMPORT[f"modeling_{kind}.py"]
        assert modeling - set(sys.stdlib_module_names) == {"torch", "transformers", *own}


def test_scripts_are_not_named_like_the_standard_library():
    assert not {path.stem for path in sources("scripts")} & set(sys.stdlib_module_names) - {"__init__"}


def test_every_source_file_names_the_licence():
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.as_posix() or "build" in path.parts or not path.read_text().strip():
            continue
        assert path.read_text().startswith("# Copyright 2026 "), path


def test_public_names_are_lazy_and_all_there():
    assert "convert_checkpoint" in dir(gated_llama)
    for name in gated_llama.__all__:
        assert getattr(gated_llama, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        gated_llama.bogus  # noqa: B018


def test_modules_that_moved_are_found_under_their_old_names_with_a_warning():
    code = "import gated_llama, sys\n"
    code += "for old, new in gated_llama._MOVED.items():\n"
    code += "    __import__(old)\n"
    code += "    assert sys.modules[old] is sys.modules[new]\n"
    code += "from gated_llama.trainer import GatedTrainer; print(GatedTrainer.__module__, GatedTrainer.__name__)\n"
    code += "import gated_llama.training.trainer as t; print(t.__spec__.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["gated_llama.training.trainer", "GatedTrainer", "gated_llama.training.trainer"], done
    assert "gated_llama.trainer is gated_llama.training.trainer now" in done.stderr
    unknown = subprocess.run(
        [sys.executable, "-c", "import gated_llama.bogus"], capture_output=True, text=True, cwd=ROOT
    )
    assert "No module named 'gated_llama.bogus'" in unknown.stderr


def test_vllms_plugin_needs_torch_and_transformers_alone():
    """An engine's environment has none of our other requirements; a plugin that cannot be imported is skipped there."""
    others = ["accelerate", "datasets", "hypothesis", "jinja2", "matplotlib", "peft", "psutil"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import gated_llama.serve; print('imported'); "
    code += "import gated_llama.checkpoints.folder"  # the control
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "imported\n" and "psutil" in done.stderr, done.stderr


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.fail("not a git checkout: the files that belong to the project are unknown")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy],
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert {name.split("/")[0] for name in names} == {*(f"{name}.py" for name in TOP), "gated_llama"}
    scripts = {f"gated_llama/scripts/{path.name}" for path in sources("scripts")}
    assert scripts <= names
    assert "gated-llama = gated_llama.scripts.cli:main" in entry_points
    assert "gated_llama = gated_llama.serve:register_with_vllm" in entry_points
