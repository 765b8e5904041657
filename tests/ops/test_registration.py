"""What is registered where: schemas, dispatch keys, and the compositions that stand in for a missing kernel."""

import inspect

import pytest
import torch

from tests.support.processes import run_python
from unirank import ops, reference

pytestmark = pytest.mark.slow

NAMES = ("cosine_accumulate_", "gram_accumulate_", "batched_eigh", "batched_svd", "global_topk")
MUTATED = {"cosine_accumulate_": ["state"], "gram_accumulate_": ["gram", "mean"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_function_a_twin_and_kernels(name: str) -> None:
    assert getattr(ops, name).__doc__
    assert getattr(reference, name).__doc__
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unirank::{name}", key), key


@pytest.mark.parametrize("name", NAMES)
def test_schema_names_what_it_mutates(name: str) -> None:
    schema = getattr(torch.ops.unirank, name).default._schema
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == MUTATED.get(name, [])


def test_twins_have_the_parameters_of_the_ops() -> None:
    for name in NAMES:
        op, twin = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        schema = getattr(torch.ops.unirank, name).default._schema
        assert op.parameters == twin.parameters
        assert [(p.name, p.default) for p in op.parameters.values()] == [
            (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in schema.arguments
        ]


def test_without_lapack_the_compositions_serve_the_cpu() -> None:
    source = """
import torch
from unirank import ops, reference
assert not ops.has_lapack()
a = torch.eye(3, dtype=torch.float64)[None] * 2
assert torch.equal(ops.batched_eigh(a)[0], torch.full((1, 3), 2.0, dtype=torch.float64))
assert torch.equal(ops.batched_svd(a)[1], torch.full((1, 3), 2.0, dtype=torch.float64))
gram, mean = torch.zeros(3, 3), torch.zeros(3)
ops.gram_accumulate_(gram, mean, torch.ones(5, 3))
assert torch.equal(gram, torch.full((3, 3), 5.0)) and torch.equal(mean, torch.full((3,), 5.0))
print("served")
"""
    assert run_python(source, UNIRANK_NO_LAPACK="1") == "served"


def test_a_missing_library_is_one_sentence() -> None:
    source = """
import pathlib, sys, types
import torch
package = types.ModuleType("unirank")
package.__path__ = [p for p in __import__("unirank").__path__]
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.suffix == ".so" else exists(self)
sys.modules.pop("unirank.ops", None)
sys.modules["unirank"] = package
try:
    import unirank.ops
except ImportError as error:
    print(error)
"""
    assert "pip install --no-build-isolation" in run_python(source)
