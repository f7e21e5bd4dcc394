"""READY: the model is imported, its axes are tagged, and what is known of its orders is read."""

from __future__ import annotations

from dataclasses import replace

import onnx

from icd_tvm._tvm import apply_pass
from icd_tvm.config import ModelKeys
from icd_tvm.errors import ConfigError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, tagged_groups
from icd_tvm.relax_passes.explain import explain_text
from icd_tvm.relax_passes.permutation_file import model_hash
from icd_tvm.runtime.budget_search import prepare_budget
from icd_tvm.runtime.compilation import Compilation
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import output_widths, read_orders, version_tag
from icd_tvm.runtime.orders import made_from
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.run_folder import PERM
from icd_tvm.runtime.state_names import expand_states
from icd_tvm.runtime.states import State


def load(job: Job, event: Stage) -> None:
    """Import the model; read the orders of an earlier run where there is one to continue."""
    keys = job.config.model
    with job.progress.stage("import") as stage:
        imported = import_onnx(load_model(keys), keys.shapes or None)
        states = expand_states(keys.opaque_states, [spec.name for spec in imported.inputs])
        mod = apply_pass(AttachLayoutTags(states), imported.mod)
        groups = tagged_groups(mod)
        stage.meta = {"nodes": len(imported.model.graph.node), "free axis groups": len(groups.free)}
    widths = output_widths(mod["main"])
    job.compilation = Compilation(replace(imported, mod=mod), groups, widths)
    if job.explain:
        print(explain_text(groups))
    job.model_hash = model_hash(mod["main"])
    event.meta |= {"model_hash": job.model_hash, **stage.meta}
    _check_model(job)
    prepare_budget(job)
    _read_orders(job)


def load_model(keys: ModelKeys) -> str | onnx.ModelProto:
    """Return a built-in model by name, or the path of a file."""
    sizes = {} if keys.seq is None else {"seq": keys.seq}
    return keys.path if keys.path is not None else build_model(str(keys.name), **sizes)


def _check_model(job: Job) -> None:
    earlier = [] if job.folder is None else job.folder.events()
    hashes = [e["meta"]["model_hash"] for e in earlier if e["stage"] == State.READY and e["ok"]]
    if hashes and hashes[0] != job.model_hash:
        raise ConfigError(
            f"the model is not the one of the earlier run: hash {job.model_hash[:12]}, "
            f"not {hashes[0][:12]}",
            "give another --out",
        )


def _read_orders(job: Job) -> None:
    stored = None if job.folder is None else job.folder.path(PERM)
    job.continued = stored is not None and stored.exists()
    path = stored if job.continued else job.reuse
    if path is None:
        return
    job.orders, version = read_orders(path, job.result.groups, job.result.widths, job.model_hash)
    if version == version_tag(made_from(job)):
        return
    if job.continued:
        raise ConfigError(
            f"{path} was decided by other versions of icd-tvm or its packages",
            "give another --out, and --reuse-perm with that file to keep its orders",
        )
    job.warn(State.READY.value, f"the orders of {path} were decided under other conditions")
