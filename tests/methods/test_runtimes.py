"""The table of runtimes: everything that names runtimes follows it, and a new one is a module and an entry."""

import ast
import shutil
import subprocess
import sys
from typing import get_args

import pytest
from places import ROOT

from compress import Request, engines
from compress.errors import RequestError
from compress.methods import runtimes
from compress.methods.quantizers import QUANTIZERS
from compress.request import fields


def test_the_tables_are_read_without_torch_or_a_runtime():
    code = (
        "import sys, compress.methods.runtimes, compress.methods.quantizers, compress.request\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'compress.engines'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_runtime_is_what_its_entry_says(name):
    entry, runtime = runtimes.RUNTIMES[name], engines.RUNTIMES[name]
    assert (runtime.name, runtime.title, runtime.flavour) == (name, entry.title, entry.flavour)
    assert (runtime.ahead_of_time, runtime.builds_for_targets) == (entry.ahead_of_time, entry.builds_for_targets)
    assert type(runtime).__module__.startswith("compress.engines.")


def test_names_elsewhere_are_those_of_the_tables():
    assert list(engines.RUNTIMES) == list(runtimes.RUNTIMES)
    assert get_args(fields.RuntimeName) == ("auto", *runtimes.RUNTIMES)
    assert get_args(fields.QuantizerNames) == (*QUANTIZERS, "none")
    integer = [name for name, entry in runtimes.RUNTIMES.items() if entry.integer_kernels]
    assert all(list(quantizer.integer_runtimes) == integer for quantizer in QUANTIZERS.values())


def test_the_delivered_script_knows_the_runtimes_that_the_table_names_for_it():
    tree = ast.parse((ROOT / "compress/report/templates/infer.py").read_text(encoding="utf-8"))
    (offered,) = (
        [key.value for key in node.value.keys]
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUNTIMES"
    )
    assert set(offered) == {entry.infer_name for entry in runtimes.RUNTIMES.values()}


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_hints_and_offsets_are_refused_where_a_runtime_has_none(name):
    entry = runtimes.RUNTIMES[name]
    for values, allowed in (
        ({"runtime_hint": "throughput"}, "throughput" in entry.hints),
        ({"quantizer": "lsq-plus"}, entry.flavour != "tensorrt"),
    ):
        if allowed:
            assert Request(model="resnet18", runtime=name, **values).runtime == name
        else:
            with pytest.raises(RequestError, match="latency, because|another one: TensorRT reads"):
                Request(model="resnet18", runtime=name, **values)


ENTRY = """        RuntimeEntry(
            "echo", "Echo", "Answers with zeros.", "echo:Echo", "onnxruntime",
            needs_gpu=False, integer_kernels=False, packages=(), infer_name="onnxruntime",
        ),
"""
MODULE = """
from compress.engines.base import OnnxLoader

class Echo(OnnxLoader, name="echo"):
    module, how_loaded = "json", "as it is"

    def open(self, path, spec):
        raise NotImplementedError
"""
USE = """
from typing import get_args
from compress import Request
from compress.engines import RUNTIMES
from compress.request.fields import RuntimeName
print(RUNTIMES["echo"].title, RUNTIMES["echo"].runs_here, Request(model="resnet18", runtime="echo").runtime)
print(get_args(RuntimeName)[-1])
"""


def test_a_new_runtime_is_one_module_and_one_entry(tmp_path):
    shutil.copytree(ROOT / "compress", tmp_path / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "compress/methods/runtimes.py"
    before, end, after = table.read_text(encoding="utf-8").partition("    )\n}  # fmt: skip\n")
    table.write_text(before + ENTRY + end + after, encoding="utf-8")
    (tmp_path / "compress/engines/echo.py").write_text(MODULE, encoding="utf-8")
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.splitlines() == ["Echo True echo", "echo"], done.stderr
