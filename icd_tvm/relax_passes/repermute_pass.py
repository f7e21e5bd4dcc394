"""RepermutePass: tag, build W, decide, rewrite and verify, as one pass for any pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.errors import VerificationError
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout, lanes_of
from icd_tvm.relax_passes.verify_layout import VerifyLayout


@tvm.transform.module_pass(opt_level=0, name="RepermutePass")
class RepermutePass:
    """Re-decide the order of every free axis of ``main`` and fold it into the constants.

    Stands anywhere before lowering, on a module whose weights are bound constants. The module
    that comes in is never changed. If the rewritten module does not compute the same outputs,
    the incoming module is returned and ``reason`` says so.

    Parameters
    ----------
    target : tvm.target.Target, optional
        Whose kernels are analysed; this machine if omitted.
    time_budget_s : float
        Seconds for the solver over all axes.
    seed : int
        Seed of the solver and of the verification inputs.
    compact : bool
        Remove hidden units that contribute nothing.
    verify : bool
        Run both modules on random inputs and compare.
    opaque_states : Sequence[tuple[str, str]], optional
        Pairs (input name, output name) that only this module reads; those of the module's tag if
        omitted. `StateOrder.read` of the result converts a saved state.

    Attributes
    ----------
    decisions : list[Decision]
        One for every axis that has a kernel on it, improved or not.
    removed : dict[str, int]
        Hidden units removed from each group.
    reason : str
        Empty if the layout was rewritten, else why the incoming module was returned.

    Examples
    --------
    ``tvm.transform.Sequential([icd_tvm.RepermutePass(), relax.transform.LegalizeOps()])(mod)``

    Examples
    --------
    >>> from icd_tvm.models.importer import import_onnx
    >>> rewrite = RepermutePass(time_budget_s=5.0)
    >>> mod = tvm.transform.Sequential([rewrite])(import_onnx(model_file).mod)
    >>> [decision.group for decision in rewrite.decisions], rewrite.reason
    (['up:1'], 'no opportunity: ...')
    """

    def __init__(
        self,
        *,
        target: Any = None,
        time_budget_s: float = 30.0,
        seed: int = 0,
        compact: bool = True,
        verify: bool = True,
        opaque_states: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self.target = target
        self.time_budget_s = time_budget_s
        self.seed = seed
        self.compact = compact
        self.verify = verify
        self.opaque_states = opaque_states
        self.decisions: list[Decision] = []
        self.removed: dict[str, int] = {}
        self.reason = ""

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return the rewritten module, or ``mod`` with a reason on the pass."""
        decide = DecidePermutation(time_budget_s=self.time_budget_s, seed=self.seed)
        rewrite = RewriteLayout(compact=self.compact, lanes=lanes_of(self.target))
        steps = [
            AttachLayoutTags(self.opaque_states),
            BuildAccessGraph(self.target),
            decide,
            rewrite,
        ]
        if self.verify:
            steps.append(VerifyLayout(mod, seed=self.seed))
        self.reason = ""
        try:
            rewritten = tvm.transform.Sequential(steps)(mod)
        except VerificationError as error:
            self.reason = str(error)
            return mod
        finally:
            self.decisions, self.removed = decide.decisions, rewrite.removed
        if not self.removed and not any(decision.improved for decision in self.decisions):
            self.reason = _nothing_to_gain(self.decisions)
        return rewritten


def _nothing_to_gain(decisions: list[Decision]) -> str:
    if not decisions:
        return "no matmul with a constant weight on a free axis; bind weights with BindParams"
    return f"no opportunity: {decisions[0].stats['reason']}"
