"""What a host without a network needs to run a compiled model: one archive, checksums inside.

The archive is a function of the run's files alone: members are sorted and carry no time, owner or
absolute path. Equal runs and equal versions of zlib make equal archives.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from icd_tvm.config_file import load_config, to_yaml
from icd_tvm.errors import ConfigError, IcdError, ModelFileError
from icd_tvm.files import write_atomically
from icd_tvm.measure.cuda_toolkit import CUDART, find_cudart
from icd_tvm.runtime.loaded import MODULE, SIGNATURE, read_signature
from icd_tvm.runtime.output import check_writable_file
from icd_tvm.runtime.run_folder import CONFIG, ENVIRONMENT, METRICS, PERM

# Everything in the archive lies in this folder.
ROOT = "icd-bundle"
SUMS, NEEDED, WHEELS = "SHA256SUMS", "requirements.txt", "wheels"
# What the library and run.py need; the compiler's packages are not among them.
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "ml-dtypes", "numpy", "typing-extensions")
# The keys of a configuration that name files and folders.
FILES = (("model", "path"), ("graph", "trace"), ("report", "out_dir"), ("cache", "dir"))
MAX_BYTES = 16 << 30
MAX_MEMBERS = 10_000
_CHUNK = 1 << 20

README = """\
# {name}: a compiled model

Arm `{arm}` of a run of icd {version}: {reason}.
Library {library:.1f} MiB, compiled for `{target}`.

    sha256sum -c SHA256SUMS
    python3 -m venv env && env/bin/pip install --no-index --find-links {wheels} -r {needed}
    env/bin/python run.py inputs.npz outputs.npz

{inputs}
`run.py` without arguments makes inputs up. With icd installed: `icd_tvm.load(".")`. Lines of TVM
that end in "Scope Loaded:" mean nothing.

Python {python} or a version that the wheels fit. Of apache-tvm only the runtime is used: with
`TVM_USE_RUNTIME_LIB=1`, or without `tvm/lib/libtvm_compiler.so` (247 MiB), the same results come
from `libtvm_runtime.so` and `libtvm_runtime_extra.so`, 4.5 MiB together. What may go from the
installed package beside the compiler: `tvm/3rdparty`, `tvm/src`, `tvm/include`, `tvm/web`.
"""


def write_bundle(run: Path, archive: Path, wheels: Path | None = None) -> list[str]:
    """Pack a finished run.

    Parameters
    ----------
    run : Path
        A run directory.
    archive : Path
        File to write, ``.tar.gz``.
    wheels : Path, optional
        Folder of wheel files to include; those of all required packages must be there.

    Returns
    -------
    list of str
        The members, without their folder.

    Raises
    ------
    ModelFileError
        If the run is not finished, left no library, or its files are damaged.
    ConfigError
        If a required wheel is missing.
    OutputError
        If the archive cannot be written.
    """
    check_writable_file(archive)
    try:
        members = _members(run, wheels)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{str(run)!r} is no sound run: {type(error).__name__}: {error}"
        ) from error
    lines = [f"{_digest(_opened(members[name]))}  {name}\n" for name in sorted(members)]
    members[SUMS] = "".join(lines).encode()

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as file,
            gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in sorted(members):
                _add(tar, name, members[name])

    write_atomically(archive, write)
    return sorted(members)


def verify_bundle(archive: Path) -> dict[str, str]:
    """Read a bundle without unpacking it and compare every checksum.

    Returns
    -------
    dict of str to str
        Member -> sha256.

    Raises
    ------
    ModelFileError
        If it is no bundle, a member is damaged, missing or not listed, or a name leads elsewhere.
    """
    found: dict[str, str] = {}
    listed: dict[str, str] | None = None
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name, stream in _contents(tar):
                if name == SUMS:
                    listed = _listed(stream.read(_CHUNK).decode())
                elif name in found:
                    raise ModelFileError(f"{str(archive)!r} holds {name!r} twice")
                else:
                    found[name] = _digest(stream)
    except IcdError:
        raise
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ModelFileError(f"{str(archive)!r} is no sound bundle: {error}") from error
    if listed is None:
        raise ModelFileError(f"{str(archive)!r} is no bundle: it holds no {SUMS}")
    wrong = sorted(n for n in found.keys() | listed.keys() if found.get(n) != listed.get(n))
    if wrong:
        raise ModelFileError(
            f"{str(archive)!r}: {wrong[0]} is damaged, missing or not listed"
            + (f", and {len(wrong) - 1} more" if wrong[1:] else ""),
            "copy it again",
        )
    return found


def _members(run: Path, wheels: Path | None) -> dict[str, Path | bytes]:
    """Return member name -> its file, or its content where it is made here."""
    if not (run / MODULE).is_file() or not (run / METRICS).is_file():
        raise ModelFileError(
            f"{str(run)!r} is no finished run: it holds no {MODULE}", "icd run --resume finishes it"
        )
    signature = read_signature(run)
    needed = _requirements(run)
    files = [] if wheels is None else _check_wheels(needed, wheels)
    members: dict[str, Path | bytes] = {
        MODULE: run / MODULE,
        SIGNATURE: (json.dumps(signature, indent=1) + "\n").encode(),
        CONFIG: _config(run).encode(),
        NEEDED: "".join(f"{name}=={version}\n" for name, version in needed.items()).encode(),
        "run.py": Path(__file__).with_name("bundled_run.py").read_bytes(),
        "README.md": _readme(run, signature, wheels is not None).encode(),
        **{f"{WHEELS}/{path.name}": path for path in files},
    }
    if (run / PERM).exists():
        members[PERM] = run / PERM
    if signature.get("device") == "cuda":
        # Redistributable by the toolkit's licence; the driver must come with the GPU.
        members[CUDART] = find_cudart()
    return members


def _config(run: Path) -> str:
    """Return the configuration; folders of this machine mean nothing on another."""
    config = load_config(run / CONFIG)
    values = config.model_dump()
    for section, key in FILES:
        if (text := values[section][key]) is not None:
            values[section][key] = Path(text).name
    return to_yaml(type(config).model_validate(values))


def _requirements(run: Path) -> dict[str, str]:
    """Return the versions that the run recorded, else those of this environment."""
    recorded = json.loads((run / ENVIRONMENT).read_text("utf-8"))["packages"]
    return {name: recorded.get(name) or importlib.metadata.version(name) for name in PACKAGES}


def _readme(run: Path, signature: Mapping[str, Any], wheels: bool) -> str:
    record = json.loads((run / METRICS).read_text("utf-8"))
    tensors = [
        f"- {kind[:-1]} `{item['name']}`: {item['dtype']} {item['shape']}\n"
        for kind in ("inputs", "outputs")
        for item in signature[kind]
    ]
    return README.format(
        name=signature["name"],
        arm=record["decision"]["arm"],
        reason=record["decision"]["reason"],
        version=record["env"]["packages"]["icd-tvm"],
        library=(run / MODULE).stat().st_size / 2**20,
        target=record["target"],
        wheels=WHEELS if wheels else "FOLDER_OF_WHEELS",
        needed=NEEDED,
        inputs="".join(tensors),
        python=record["env"]["python"],
    )


def _check_wheels(needed: Mapping[str, str], folder: Path) -> list[Path]:
    """Return the wheel files of a folder once every required package is among them."""
    wheels = sorted(folder.glob("*.whl"))
    # A file is NAME-VERSION-TAGS.whl, with no "-" in NAME.
    there = {tuple(path.name.split("-")[:2]) for path in wheels}
    missing = [
        f"{name}=={version}"
        for name, version in needed.items()
        if (name.replace("-", "_"), version) not in there
    ]
    if missing:
        raise ConfigError(
            f"{str(folder)!r} holds no wheel of {', '.join(missing)}",
            f"pip download --no-deps -d {folder} {' '.join(missing)}",
        )
    return wheels


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    # A fresh TarInfo: time 0, no owner, mode 0644.
    info = tarfile.TarInfo(f"{ROOT}/{name}")
    with _opened(content) as stream:
        info.size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        tar.addfile(info, stream)


def _opened(content: Path | bytes) -> IO[bytes]:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _digest(stream: IO[bytes]) -> str:
    result = hashlib.sha256()
    with stream:
        while chunk := stream.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()


def _contents(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name inside the bundle and the content of every member; refuse odd ones."""
    total = 0
    for count, info in enumerate(tar):
        total += info.size
        if count >= MAX_MEMBERS or total > MAX_BYTES:
            raise ModelFileError(f"more than {MAX_MEMBERS} members or {MAX_BYTES >> 30} GiB")
        parts = PurePosixPath(info.name).parts
        stream = tar.extractfile(info) if info.isreg() else None
        if stream is None or len(parts) < 2 or parts[0] != ROOT or ".." in parts:
            raise ModelFileError(f"member {info.name!r} is no file of a bundle", "do not unpack it")
        yield "/".join(parts[1:]), stream


def _listed(text: str) -> dict[str, str]:
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return {name: digest for digest, name in pairs}
