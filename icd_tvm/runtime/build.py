"""Lower a module and wrap the result as something that runs on numpy inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import relax, tvm
from icd_tvm.relax_passes.fuse_quantized_matmul import read_byte_kernels
from icd_tvm.relax_passes.lower_cpu import lower_and_build
from icd_tvm.relax_passes.state_order import StateOrder
from icd_tvm.relax_passes.step_cache import StepCache
from icd_tvm.tvm_log import without_scope_lines


class Built:
    """A compiled module on the CPU.

    Parameters
    ----------
    executable : relax.VMExecutable
        What the lowering returned.
    input_names : Sequence[str]
        Names of the inputs of ``main``, in order.
    kernels : Mapping[str, str]
        The kernel chosen for each matmul whose weight has zeros or is quantised.
    states : StateOrder, optional
        The order in which the module keeps its opaque states. Callers see the original one.
    lowered : tvm.IRModule, optional
        What was compiled: calls of scheduled TIR functions.
    cache : StepCache, optional
        Of a step that was rewritten for fewer cache slots. Callers pass the whole cache, or
        one with the slots that are left, as the outputs have them.
    """

    def __init__(
        self,
        executable: Any,
        input_names: list[str],
        kernels: Mapping[str, str],
        states: StateOrder | None = None,
        lowered: Any = None,
        cache: StepCache | None = None,
    ) -> None:
        self.executable = executable
        self.lowered = lowered
        self.states = states or StateOrder()
        self.cache = cache
        self.input_names = input_names
        self.kernels = dict(kernels)
        self.vm = relax.VirtualMachine(executable, tvm.cpu())

    def run_all(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run once and return every output as numpy."""
        result = self.vm["main"](*self._arguments(feeds))
        outputs = list(result) if not isinstance(result, tvm.runtime.Tensor) else [result]
        return self.states.outputs_to_original([tensor.numpy() for tensor in _flatten(outputs)])

    def comparable(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return another build's outputs with zeros where this one keeps no state."""
        return self.states.outputs_to_original(self.states.outputs_to_own(outputs))

    def caller(self, feeds: Mapping[str, np.ndarray], machine: Any = None) -> Callable[[], Any]:
        """Return a function without arguments that runs the module on fixed inputs.

        ``machine`` is another virtual machine of the executable; this one's own if omitted.
        """
        arguments = self._arguments(feeds)
        function = (machine or self.vm)["main"]
        return lambda: function(*arguments)

    def evaluate_time(self, feeds: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """Return seconds of ``repeats`` calls on fixed inputs by TVM's ``time_evaluator``."""
        timer = self.vm.time_evaluator("main", tvm.cpu(), number=1, repeat=repeats)
        return [float(seconds) for seconds in timer(*self._arguments(feeds)).results]

    def export(self, path: str) -> None:
        """Write the library, weights inside, to ``path``."""
        with without_scope_lines():
            self.executable.export_library(path)

    def own_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the inputs as the module takes them: its own cache slots, states in its order."""
        # Scales of a quantised cache are not there while its whole cache is given.
        names = self.input_names if self.cache is None else feeds.keys() & self.input_names
        given = {name: np.asarray(feeds[name]) for name in names}
        whole = given if self.cache is None else self.cache.inputs_to_own(given)
        return dict(self.states.inputs_to_own(whole))

    def _arguments(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        own = self.own_feeds(feeds)
        return [tvm.runtime.tensor(np.asarray(own[n], order="C")) for n in self.input_names]


def build(mod: Any, target: Any, tune: bool = True) -> Built:
    """Lower ``main`` of ``mod`` for ``target`` and load it; ``tune`` is `lower_and_build`'s."""
    names = [parameter.name for parameter in mod["main"].params]
    lowered = lower_and_build(mod, target, tune=tune)
    kernels = {node: f"{choice.kind}, {choice.nk} rows" for node, choice in lowered.choices.items()}
    kernels |= read_byte_kernels(lowered.mod)
    states, cache = StateOrder.read(mod), StepCache.read(mod)
    return Built(lowered.executable, names, kernels, states, lowered.mod, cache)


def _flatten(outputs: list[Any]) -> list[Any]:
    flat: list[Any] = []
    for output in outputs:
        flat.extend([output] if isinstance(output, tvm.runtime.Tensor) else _flatten(list(output)))
    return flat
