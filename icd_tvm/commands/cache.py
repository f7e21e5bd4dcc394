"""``icd cache``: look after the permutations and the kernel times that are kept."""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icd_tvm.arguments import Parser
from icd_tvm.errors import ConfigError, PermutationError
from icd_tvm.files import CACHE_VARIABLE

if TYPE_CHECKING:
    from icd_tvm.runtime.cache_entry import CacheEntry
    from icd_tvm.runtime.cache_store import CacheStore, EntryFile
    from icd_tvm.runtime.perm_cache import PermutationCache

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_EXAMPLES = f"""examples:
  icd cache ls
  icd cache show 3f2a
  icd cache verify --json
  icd cache prune --max-size 64M
  icd cache export perms.zip
  icd cache import perms.zip
  icd cache kernels --clear

The folder is --cache, else {CACHE_VARIABLE}/permutations, else the user's cache folder. Kernel
times lie in the folder above permutations, for which --cache is that one."""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd cache",
        description="Look after the permutations that earlier runs decided, and the times of "
        "kernels by which they chose.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = result.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "ls", "list the entries")
    show = _action(actions, "show", "print one entry")
    show.add_argument("key", metavar="KEY", help="key, or the start of one")
    _action(actions, "verify", "check every entry; put damaged ones aside and exit with status 2")
    prune = _action(actions, "prune", "delete the entries unused for longest")
    prune.add_argument(
        "--max-size", metavar="SIZE", help="what may stay: 0, 500K, 64M, 1G (default: the cap)"
    )
    export = _action(actions, "export", "write entries to one archive")
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument("keys", nargs="*", metavar="KEY", help="all entries if omitted")
    take = _action(actions, "import", "check an archive and take its entries")
    take.add_argument("file", type=Path, metavar="FILE")
    kernels = _action(actions, "kernels", "list the kernels that were timed to choose among them")
    kernels.add_argument("--clear", action="store_true", help="delete the times")
    return result


def _action(actions: Any, name: str, text: str) -> Parser:
    result: Parser = actions.add_parser(name, help=text, description=text)
    result.add_argument("--cache", type=Path, metavar="DIR", help="folder of the cache")
    result.add_common()
    return result


def run(arguments: argparse.Namespace) -> None:
    """Do what is asked and print what was done."""
    from icd_tvm.runtime.perm_cache import PermutationCache

    cache = PermutationCache(arguments.cache)
    record, text = _ACTIONS[arguments.action](cache, arguments)
    if arguments.json or not arguments.quiet:
        print(json.dumps(record, indent=1) if arguments.json else text)
    if record.get("damaged"):
        raise PermutationError(
            f"{len(record['damaged'])} damaged cache entries", "the next run decides them again"
        )


Result = tuple[dict[str, Any], str]


def _ls(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    files = cache.store.files()[::-1]
    rows = [_row(cache.store, file) for file in files]
    total, aside = sum(file.size for file in files), cache.store.quarantined()
    lines = [f"{r['key'][:16]}  {r['bytes']:>9}  {r['used']}  {r['state']}" for r in rows]
    lines.append(f"{len(rows)} entries, {total} bytes in {cache.store.root}")
    if aside:
        lines.append(f"{len(aside)} damaged ones in {cache.store.aside}")
    record = {
        "folder": str(cache.store.root),
        "bytes": total,
        "max_bytes": cache.store.max_bytes,
        "entries": rows,
        "quarantined": [path.name for path in aside],
    }
    return record, "\n".join(lines)


def _row(store: CacheStore, file: EntryFile) -> dict[str, Any]:
    entry, problem = _load(store, file.key)
    if entry is not None:
        problem = f"model {entry.model_hash[:12]}, {len(entry.perms)} groups"
    return {"key": file.key, "bytes": file.size, "used": _when(file.used), "state": problem}


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return "never (broken clock)"


def _load(store: CacheStore, key: str) -> tuple[CacheEntry | None, str]:
    """Return an entry, or None and why it cannot be used."""
    from icd_tvm.runtime.cache_entry import NewerFormatError, decode

    try:
        data = store.read(key)
        return (None, "gone") if data is None else (decode(data, key), "")
    except NewerFormatError as error:
        return None, str(error)
    except PermutationError as error:
        return None, f"damaged: {error}"
    except OSError as error:
        return None, f"cannot be read: {error.strerror or error}"


def _show(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    key = _full_key(cache.store, arguments.key)
    entry, problem = _load(cache.store, key)
    if entry is None:
        raise PermutationError(f"cache entry {key}: {problem}", "icd cache verify")
    groups = {
        group: {"n": perm.size, "constraint": entry.constraints[group].kind, "perm": perm.tolist()}
        for group, perm in entry.perms.items()
    }
    head = {
        "key": key,
        "model_hash": entry.model_hash,
        "created": entry.created,
        "versions": entry.versions,
    }
    record = {**head, "groups": groups, "meta": entry.meta}
    lines = [f"{name}: {value}" for name, value in head.items()]
    lines += [
        f"group {name}: {group['n']} indices, {group['constraint']}, "
        f"{str(group['perm'][:6])[:-1]}{', ...]' if group['n'] > 6 else ']'}"
        for name, group in groups.items()
    ]
    return record, "\n".join([*lines, f"meta: {json.dumps(entry.meta)}"])


def _full_key(store: CacheStore, start: str) -> str:
    found = [file.key for file in store.files() if start and file.key.startswith(start)]
    if len(found) != 1:
        many = "no entry" if not found else f"{len(found)} entries"
        raise ConfigError(f"{many} with a key that starts with {start!r}", "icd cache ls")
    return found[0]


def _verify(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    record = cache.verify()
    lines = [f"damaged {name}: {reason}" for name, reason in record["damaged"].items()]
    lines += [f"left alone {name}: {reason}" for name, reason in record["left"].items()]
    lines.append(f"{record['sound']} sound entries")
    if record["stale"]:
        lines.append(f"{record['stale']} unfinished files removed")
    return record, "\n".join(lines)


def _prune(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    given = arguments.max_size
    removed = cache.store.prune(cache.store.max_bytes if given is None else _parse_size(given))
    left = cache.store.files()
    record = {"removed": removed, "left": len(left), "bytes": sum(file.size for file in left)}
    return record, f"{len(removed)} entries removed, {len(left)} of {record['bytes']} bytes left"


def _parse_size(text: str) -> int:
    number, unit = text.upper().removesuffix("B"), ""
    if number[-1:] in _UNITS:
        number, unit = number[:-1], number[-1:]
    if not (number.isascii() and number.isdigit()) or len(number) > 15:
        raise ConfigError(f"bad value: --max-size {text}", "write 500K, 64M or 1G")
    return int(number) * _UNITS[unit]


def _export(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    from icd_tvm.runtime.cache_archive import export_entries

    keys = [_full_key(cache.store, key) for key in arguments.keys]
    written, skipped = export_entries(cache.store, arguments.file, keys)
    lines = [f"left out {key}: {reason}" for key, reason in skipped.items()]
    lines.append(f"{len(written)} entries written to {arguments.file}")
    record = {"file": str(arguments.file), "exported": written, "skipped": skipped}
    return record, "\n".join(lines)


def _import(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    from icd_tvm.runtime.cache_archive import import_entries

    result = import_entries(cache, arguments.file)
    return {"added": result.added, "kept": result.kept}, (
        f"{len(result.added)} entries added, {len(result.kept)} were here already"
    )


def _kernels(cache: PermutationCache, arguments: argparse.Namespace) -> Result:
    from icd_tvm.tir_schedules.cpu.kernel_database import FILE_NAME, KernelDatabase

    database = KernelDatabase(arguments.cache and arguments.cache / FILE_NAME)
    records = database.records()
    record = {"file": str(database.path), "damaged lines": database.damaged, "kernels": records}
    if arguments.clear:
        return {**record, "removed": database.clear()}, f"{len(records)} comparisons removed"
    lines = [
        f"{'x'.join(map(str, r['shape'])):>16} threads {r['threads']}: "
        + ", ".join(f"{kind} {1e6 * s:.0f} us" for kind, s in r["seconds"].items())
        for r in records
    ]
    return record, "\n".join([*lines, f"{len(records)} comparisons in {database.path}"])


_ACTIONS = {
    "kernels": _kernels,
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "prune": _prune,
    "export": _export,
    "import": _import,
}
