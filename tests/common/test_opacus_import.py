"""Opacus' accountants without torch: the same numbers, and Opacus stays whole."""

import subprocess
import sys
from textwrap import dedent

import pytest


def run(code: str) -> str:
    """Run lines in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PLANNED = """
    import sys
    from common.accounting import OPACUS, assess, sampled_noise_multiplier
    from common.events import PoissonGaussianSum
    from common.opacus_import import opacus_accountants
    sigma = sampled_noise_multiplier(2.0, 1e-5, 0.1, 50, ())
    said = assess([PoissonGaussianSum(sigma, 1.0, 0.1, 50)], 1e-5).opinions[OPACUS]
"""


def test_a_sampled_plan_needs_no_torch() -> None:
    """Neither the search nor the confirmation of a plan imports torch, or leaves Opacus behind."""
    code = f"{PLANNED}    print(type(said).__name__, {{'torch', 'opacus'}} & set(sys.modules))"
    assert run(code) == "float set()"


@pytest.mark.parametrize("first", ["", "    import opacus\n"])
def test_the_same_numbers(first: str) -> None:
    """Whether Opacus was imported before or is imported afterwards, it says the same."""
    code = f"""
    import sys
{first}{PLANNED}
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.accountants import PRVAccountant
    from opacus.optimizers import DPOptimizer
    assert PrivacyEngine().accountant is not None
    assert DPOptimizer.__module__ == "opacus.optimizers.optimizer"
    own, its = opacus_accountants().PRVAccountant(), PRVAccountant()
    own.history = its.history = [(sigma, 0.1, 50)]
    assert own.get_epsilon(1e-5) == its.get_epsilon(1e-5)
    print(type(own) is type(its))
    """
    assert run(code) == str(bool(first))


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Opacus is not installed an ImportError says so, and nothing is left behind."""
    from common import opacus_import

    monkeypatch.setattr(opacus_import, "_found", [])
    monkeypatch.setattr(opacus_import, "find_spec", lambda _: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="opacus is not installed"):
        opacus_import.opacus_accountants()
    assert "opacus" not in sys.modules
