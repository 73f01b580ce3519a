"""The package as a whole: its names, signatures, documentation, layers and metadata."""

import ast
import graphlib
import importlib.metadata
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import refdist
from refdist import StatelessProcessGroup, errors

DEADLINE = 60  # seconds, for another process
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "refdist"


# Importing loads nothing heavy, starts no thread and forms no group.


def test_import():
    heavy = ["matplotlib", "ipyparallel", "IPython", "zmq"]
    code = (
        "import refdist, sys, threading, torch.distributed as dist\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "print(dist.is_initialized(), threading.active_count())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert finished.stdout.splitlines() == ["[]", "False 1"]


# Signatures, as the specification and vLLM 0.33 have them: names, order and defaults. REQUIRED is
# a parameter without a default there; here it may have one. Parameters of our own come after.

REQUIRED = object()
SPECIFIED = {
    "StatelessProcessGroup": {
        "rank": REQUIRED,
        "world_size": REQUIRED,
        "store": REQUIRED,
        "socket": REQUIRED,
        "data_expiration_seconds": 3600,
        # dataclass fields; an empty dict or deque for each group
        "send_dst_counter": REQUIRED,
        "recv_src_counter": REQUIRED,
        "broadcast_send_counter": 0,
        "broadcast_recv_src_counter": REQUIRED,
        "entries": REQUIRED,
    },
    "StatelessProcessGroup.create": {
        "host": REQUIRED,
        "port": REQUIRED,
        "rank": REQUIRED,
        "world_size": REQUIRED,
        "data_expiration_seconds": 3600,
        "store_timeout": 300,
        "listen_socket": None,
    },
    "StatelessProcessGroup.barrier": {"self": REQUIRED, "timeout": 30.0},
    "StatelessProcessGroup.send_obj": {"self": REQUIRED, "obj": REQUIRED, "dst": REQUIRED},
    "StatelessProcessGroup.recv_obj": {"self": REQUIRED, "src": REQUIRED},
    "StatelessProcessGroup.broadcast_obj": {"self": REQUIRED, "obj": REQUIRED, "src": REQUIRED},
    "StatelessProcessGroup.all_gather_obj": {"self": REQUIRED, "obj": REQUIRED},
    "StatelessProcessGroup.expire_data": {"self": REQUIRED},
    "StatelessProcessGroup.send": {"self": REQUIRED, "tensor": REQUIRED, "dst": REQUIRED},
    "StatelessProcessGroup.recv": {"self": REQUIRED, "tensor": REQUIRED, "src": REQUIRED},
    "StatelessProcessGroup.broadcast": {"self": REQUIRED, "tensor": REQUIRED, "src": REQUIRED},
    "StatelessProcessGroup.all_reduce": {"self": REQUIRED, "tensor": REQUIRED},
    "sched_yield": {},
    "divide": {"numerator": REQUIRED, "denominator": REQUIRED},
    "ensure_divisibility": {"numerator": REQUIRED, "denominator": REQUIRED},
    "split_tensor_along_last_dim": {
        "tensor": REQUIRED,
        "num_partitions": REQUIRED,
        "contiguous_split_chunks": False,
    },
    "get_pp_indices": {"num_hidden_layers": REQUIRED, "pp_rank": REQUIRED, "pp_size": REQUIRED},
    "init_gloo_process_group": {
        "backend": REQUIRED,
        "prefix_store": REQUIRED,
        "group_rank": REQUIRED,
        "group_size": REQUIRED,
        "timeout": REQUIRED,
    },
    "stateless_init_torch_distributed_process_group": {
        "host": REQUIRED,
        "port": REQUIRED,
        "rank": REQUIRED,
        "world_size": REQUIRED,
        "backend": REQUIRED,
        "group_name": None,
        "return_store": False,
        "listen_socket": None,
        "timeout": None,
    },
    "stateless_destroy_torch_distributed_process_group": {"pg": REQUIRED},
    "create_tcp_store": {"host": REQUIRED, "port": REQUIRED, "listen_socket": None},
    "cpu_all_reduce_": {"tensor": REQUIRED, "group": REQUIRED, "timeout": None},
    "get_cached_tcp_store_client": {"host": REQUIRED, "port": REQUIRED},
    "verify_group_size_divides_partition": {
        "input_size_per_partition": REQUIRED,
        "group_size": REQUIRED,
        "layer_name": None,
        "extra_suggestion": "",
    },
    "is_weak_contiguous": {"inp": REQUIRED},
}


def resolve(name):
    value = refdist
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", list(SPECIFIED))
def test_signature(name):
    parameters = list(inspect.signature(resolve(name)).parameters.values())
    specified = SPECIFIED[name]
    assert [parameter.name for parameter in parameters[: len(specified)]] == list(specified)
    for parameter, default in zip(parameters, specified.values(), strict=False):
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if default is not REQUIRED:
            assert parameter.default == default and type(parameter.default) is type(default)
    for parameter in parameters[len(specified) :]:
        optional = parameter.default is not inspect.Parameter.empty
        assert optional or parameter.kind is inspect.Parameter.VAR_KEYWORD


def test_create_is_static():
    assert isinstance(inspect.getattr_static(StatelessProcessGroup, "create"), staticmethod)


def test_public_names():
    functions = {name for name in SPECIFIED if "." not in name}
    own = {"PhaseEvent", *(name for name in vars(errors) if name.endswith(("Error", "Warning")))}
    assert set(refdist.__all__) == functions | own | {"USE_SCHED_YIELD"}
    assert all(hasattr(refdist, name) for name in refdist.__all__)
    assert isinstance(refdist.USE_SCHED_YIELD, bool)


# Documentation: everything that a user can reach says what it does.


def documented_things():
    for name in refdist.__all__:
        value = getattr(refdist, name)
        if not callable(value):
            continue
        yield name, value
        if inspect.isclass(value):
            for member_name, member in vars(value).items():
                if not member_name.startswith("_") and (
                    inspect.isroutine(member) or isinstance(member, property | staticmethod)
                ):
                    yield f"{name}.{member_name}", member


@pytest.mark.parametrize(
    ("name", "value"), list(documented_things()), ids=lambda x: x if isinstance(x, str) else "-"
)
def test_public_things_are_documented(name, value):
    text = inspect.getdoc(value)
    # a dataclass without a docstring gets its signature as one
    assert text and not text.startswith(f"{name}("), name
    assert text[0].isupper() or text.startswith("``"), name
    function = value.__func__ if isinstance(value, staticmethod) else value
    if inspect.isfunction(function) and not typing.get_overloads(function):
        assert "return" in function.__annotations__, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_modules_are_documented(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path


# Errors: RuntimeErrors, as the specification promises, that survive a trip between processes.


@pytest.mark.parametrize("kind", [vars(errors)[n] for n in vars(errors) if n.endswith("Error")])
def test_errors_can_be_pickled(kind):
    assert issubclass(kind, RuntimeError)
    error = kind("a text")
    for name in vars(error):
        setattr(error, name, (1, name))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "a text"
    assert vars(copy) == vars(error)


# Layers: a module imports from its own folder and from those above it in this list; and nowhere in
# the package do imports go round in a circle.

LAYERS = [
    {"errors", "checks", "command_line", "torch_versions", "polling", "tensor_parallel"},
    {"deadline", "pipeline"},
    {"store"},
    {"calls"},
    {"phases"},
    {"barrier"},
    {"objects"},
    {"vllm_wire"},
    {"joining"},
    {"torch_groups"},
    {"group"},
    {"nccl", "weights"},
    {"exploration"},
    {"benchmarks"},
    {"lab"},
    {"__main__"},
]
CORE = set().union(*LAYERS[:12]) | {"__init__"}
FOR_NOTEBOOKS = {"matplotlib", "mpl_toolkits", "ipyparallel", "IPython", "numpy"}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inner or {node.module}
    return found


def place_of(name):
    """The file or folder directly in the package that a module is, or is in."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_module_has_its_layer():
    assert {place_of(name) for name in MODULES} == set().union(*LAYERS) | {"__init__"}
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("name", [name for name in MODULES if name != "refdist"])
def test_imports_point_down(name):
    level = next(level for level, names in enumerate(LAYERS) if place_of(name) in names)
    allowed = set().union(*LAYERS[:level]) | {place_of(name)}
    if place_of(name) in ("benchmarks", "exploration", "lab", "__main__"):
        allowed.add("__init__")  # they use refdist as others do
    inside = {place_of(other) for other in imports(MODULES[name]) & set(MODULES)}
    assert inside <= allowed


def test_imports_do_not_go_round_in_a_circle():
    graph = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_core_imports_torch_and_the_standard_library():
    for name, path in MODULES.items():
        foreign = {other.split(".")[0] for other in imports(path)} - set(sys.stdlib_module_names)
        if place_of(name) in CORE:
            assert foreign <= {"torch", "refdist"}, name
        elif place_of(name) != "lab":
            assert not foreign & FOR_NOTEBOOKS, name


def test_benchmarks_load_nothing_before_they_are_asked_for():
    assert not imports(PACKAGE / "benchmarks" / "__init__.py")


def test_a_package_offers_what_its_modules_define():
    import refdist.pipeline

    for name in refdist.pipeline.__all__:
        value = getattr(refdist.pipeline, name)
        if callable(value):
            text = inspect.getdoc(value)
            assert text and not text.startswith(f"{name}("), name


# Metadata: three files say what is needed, and agree.

PYPI_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "python-build": "build"}


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def project(pyproject):
    return pyproject["project"]


@pytest.fixture(scope="module")
def needed(pyproject):
    """What make installs: requirements by name."""
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    everything = [{"include-group": name} for name in groups if name != "dev"]
    assert groups["dev"] == everything
    # nccl needs CUDA, and make leaves it out
    assert set(project["optional-dependencies"]) == {"notebooks", "nccl"}
    lines = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    lines += [line for name in groups if name != "dev" for line in groups[name]]
    found = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def pins():
    """Versions of constraints.txt by name."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            name = canonicalize_name(name)
            assert exact and Version(version), line
            assert name not in found, f"{name} is pinned twice"
            found[name] = version
    return found


def test_environment_yml_agrees_with_pyproject(project, needed):
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {}
    for entry in listed:
        if isinstance(entry, str) and entry != "make":
            requirement = Requirement(entry)
            name = PYPI_NAMES.get(requirement.name, requirement.name)
            conda[canonicalize_name(name)] = requirement.specifier
    python = conda.pop("python")
    assert conda == {name: requirement.specifier for name, requirement in needed.items()}
    assert project["requires-python"] in str(python)
    assert [entry for entry in listed if isinstance(entry, dict)] == [
        {"pip": ["--no-deps --editable ."]}
    ]


def test_constraints_pin_what_is_needed(needed, pins):
    for name, requirement in needed.items():
        assert str(requirement.specifier).startswith(">="), f"{name} has no lower bound"
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), name


OF_CUDA = ("cuda-", "nvidia-", "triton")  # torch with CUDA brings them, and says which versions


def test_constraints_pin_what_the_needed_need(needed, pins):
    wanted = {name: set(requirement.extras) for name, requirement in needed.items()}
    todo = list(wanted)
    while todo:
        name = todo.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # this environment is not that of make
        assert name in pins, f"{name} is not pinned"
        for inner in map(Requirement, lines):
            marker = inner.marker
            if marker and not any(marker.evaluate({"extra": e}) for e in {"", *wanted[name]}):
                continue
            inner_name = canonicalize_name(inner.name)
            if inner_name.startswith(OF_CUDA):
                continue
            if inner_name not in wanted or not inner.extras <= wanted[inner_name]:
                wanted.setdefault(inner_name, set()).update(inner.extras)
                todo.append(inner_name)


def test_ci_runs_on_every_python_that_is_promised(project):
    path = ROOT / ".github" / "workflows" / "ci.yml"
    if not path.exists():
        pytest.skip("this is a release, which has no workflows")
    tested = yaml.safe_load(path.read_text())["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = "Programming Language :: Python :: "
    classifiers = project["classifiers"]
    assert [f"{promised}{version}" for version in tested] == [
        classifier for classifier in classifiers if classifier.startswith(f"{promised}3.")
    ]


def test_license(project):
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_version(project):
    try:
        installed = importlib.metadata.version("refdist")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert refdist.__version__ == installed
    assert installed in (project["version"], "0+unknown")


# The two files of a release: what is in them, and whether a stranger's environment can use them.
# They are built from a copy, because setuptools writes beside what it builds from.


def run(*command, cwd, **options):
    finished = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
        check=False,
        **options,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


FOLDERS = ["docs", "notebooks", "refdist", "tests"]
FILES = [
    *(f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "README", "SECURITY")),
    *("CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile"),
    *("constraints.txt", "environment.yml", "pyproject.toml"),
]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder of the release, and what it is made from, by paths in the checkout."""
    top = tmp_path_factory.mktemp("release")
    copy = top / "refdist"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    made = {"__pycache__", ".ipynb_checkpoints"}
    paths = [path.relative_to(copy) for path in copy.rglob("*") if path.is_file()]
    files = {path.as_posix() for path in paths if not made & set(path.parts)}
    # the wheel is built from the sdist; without isolation, no package index is asked
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir=dist", copy, cwd=top)
    return top / "dist", files


def test_a_release_is_whole(release):
    folder, files = release
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir(), cwd=folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        names = {
            name.partition("/")[2]
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    added = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if "egg-info" not in name} == files | added
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in files if name.startswith("refdist/")}
    assert {Path(name).suffix for name in names} == {".py", ".typed"}


def test_the_wheel_works_in_a_new_environment(release, project, tmp_path):
    folder, _ = release
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    wheel = next(folder.glob("*.whl"))
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    code = "import refdist; print(refdist.__file__, refdist.__version__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = run(python, "-c", code, cwd=tmp_path, env=environment)
    assert printed.split() == [str(site / "refdist" / "__init__.py"), project["version"]]
