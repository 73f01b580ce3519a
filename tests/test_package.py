"""The package as a whole: its names, signatures, documentation, layers and metadata."""

import ast
import graphlib
import importlib.metadata
import importlib.resources
import inspect
import os
import pickle
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

import refdist
from refdist import StatelessProcessGroup, errors

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
    {"errors", "checks", "torch_versions", "polling", "tensor_parallel"},
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
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", [name for name in MODULES if name != "refdist"])
def test_imports_point_down(name):
    level = next(level for level, names in enumerate(LAYERS) if place_of(name) in names)
    allowed = set().union(*LAYERS[:level]) | {place_of(name)}
    if place_of(name) in ("benchmarks", "exploration", "lab"):
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

CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+?)\s*(>=\s*([0-9.]+).*)?$")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_requirements(lines):
    """Lower bounds, by normalised name."""
    bounds = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        assert match and match[3], f"{line!r} has no lower bound"
        bounds[normal(CONDA_NAMES.get(match[1], match[1]))] = match[3]
    return bounds


def release(version):
    return tuple(int(part) for part in version.split("+")[0].split("."))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def bounds(project):
    # that of NCCL needs CUDA, and make leaves it out
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "nccl"]
    return parse_requirements([*project["dependencies"], *(line for e in extras for line in e)])


def test_environment_yml_agrees_with_pyproject(project, bounds):
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain = [entry for entry in listed if isinstance(entry, str) and entry not in ("pip", "make")]
    conda = parse_requirements(plain)
    python = conda.pop("python")
    assert conda == bounds
    assert project["requires-python"] == f">={python}"
    assert [entry for entry in listed if isinstance(entry, dict)] == [
        {"pip": ["--no-deps --editable ."]}
    ]


def test_constraints_pin_every_direct_dependency(bounds):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact and version, line
            assert normal(name) not in pins, f"{name} is pinned twice"
            pins[normal(name)] = version
    for name, bound in bounds.items():
        assert name in pins, f"{name} is not pinned"
        assert release(pins[name]) >= release(bound), name


def test_types_ship_with_the_package(project):
    assert (importlib.resources.files("refdist") / "py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in data["package-data"]["refdist"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_version(project):
    try:
        installed = importlib.metadata.version("refdist")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert refdist.__version__ == installed
    assert installed in (project["version"], "0+unknown")
