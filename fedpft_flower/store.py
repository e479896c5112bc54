"""Name sub-FMs by their content, and keep them on a node's disk."""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpft_flower.codec import decode_weights, encode_weights
from fedpft_flower.config import FedPFTError
from fedpft_flower.disk import cache_dir, last_used
from fedpft_flower.package import Package, check_processor_file
from fedpft_flower.plan import Plan


def tensors_hash(tensors: Mapping[str, Tensor], *more: bytes) -> str:
    """Return the SHA-256 of tensors (names, dtypes, shapes, bytes) and more content."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    for content in more:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


_LIMITS = "activity-limits."


def package_tensors(package: Package, codec: str = "fp32") -> dict[str, Tensor]:
    """Return all tensors of a package under distinct names, weights encoded."""
    limits = {f"{_LIMITS}{i}": limit for i, limit in enumerate(package.activity_limits)}
    return {**encode_weights(package.weights, codec), **limits}


def package_json(package: Package) -> str:
    """Return all of a package but its tensors, as JSON."""
    files = {
        name: base64.b64encode(body).decode()
        for name, body in package.processor_files.items()
    }
    return json.dumps(
        {
            "model": package.model_config,
            "plan": package.plan.to_json(),
            "head": package.head,
            "objective": package.objective,
            "files": files,
        },
        sort_keys=True,
    )


def package_from(text: str, tensors: Mapping[str, Tensor]) -> Package:
    """Rebuild a package from its JSON and its tensors; weights become float32."""
    data = json.loads(text)
    limits = sorted(
        (name for name in tensors if name.startswith(_LIMITS)),
        key=lambda name: int(name.removeprefix(_LIMITS)),
    )
    return Package(
        model_config=data["model"],
        plan=Plan.from_json(data["plan"]),
        head=tuple(data["head"]),
        weights=decode_weights(
            {n: t for n, t in tensors.items() if not n.startswith(_LIMITS)}
        ),
        activity_limits=[tensors[name] for name in limits],
        processor_files={n: base64.b64decode(b) for n, b in data["files"].items()},
        objective=data["objective"],
    )


def package_hash(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the content hash that names a sub-FM everywhere."""
    return tensors_hash(tensors, text.encode())


_HASH = re.compile("[0-9a-f]{64}")


class Store:
    """Keep installed sub-FMs on a node's disk, each under its content hash.

    Virtual clients of one machine share it. A copy is written to a temporary name and
    renamed, and verified by hash whenever it is loaded.
    """

    # Copies beyond the newest so many are removed, if no run used them for so long.
    KEEP, UNUSED_SECONDS = 4, 600.0

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or cache_dir() / "sub-fms"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self.name = self._own_name()
        except OSError as error:
            raise FedPFTError(
                f"cannot keep sub-FMs in {self._root} ({error}); set FEDPFT_CACHE to a "
                "directory that can be written"
            ) from error

    def _own_name(self) -> str:
        """Return the name that tells this store from every other one."""
        path = self._root / "name"
        if not path.exists():
            # A hard link appears whole and only once, also with many processes.
            draft = self._root / f"{uuid.uuid4().hex}.partial"
            draft.write_text(uuid.uuid4().hex)
            try:
                path.hardlink_to(draft)
            except FileExistsError:
                pass  # another process was first
            finally:
                draft.unlink()
        return path.read_text()

    def hashes(self) -> list[str]:
        """Return the hashes of all copies."""
        return sorted(p.name for p in self._root.iterdir() if len(p.name) == 64)

    def directory(self, content: str) -> Path:
        """Return where a copy is, or would be."""
        return self._root / content

    def put(self, content: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Add a copy.

        Raises:
            FedPFTError: the content does not have this hash, or the disk refuses.
        """
        if package_hash(tensors, text) != content:
            raise FedPFTError(f"received sub-FM does not have the hash {content[:12]}")
        draft = Path(tempfile.mkdtemp(dir=self._root, suffix=".partial"))
        try:
            save_file(
                {n: t.contiguous() for n, t in tensors.items()}, draft / "weights"
            )
            (draft / "package.json").write_text(text, encoding="utf-8")
            (draft / "processor").mkdir()
            for name, body in json.loads(text)["files"].items():
                check_processor_file(name)
                (draft / "processor" / name).write_bytes(base64.b64decode(body))
            if _read(draft, content) is None:
                raise FedPFTError(
                    f"received sub-FM {content[:12]} does not come back from the disk "
                    "as it was sent; mend the server, or this node's disk"
                )
            self._move(draft, content)
        except (OSError, SafetensorError) as error:  # the latter says "disk full"
            raise FedPFTError(
                f"cannot keep the sub-FM in {self._root}: {error}; make room there, or "
                "set FEDPFT_CACHE"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._prune()

    def get(self, content: str) -> tuple[dict[str, Tensor], str] | None:
        """Return tensors and JSON of a copy, or None if it is missing or damaged."""
        if not _HASH.fullmatch(content):  # it could lead out of the store
            return None
        held = _read(self.directory(content), content)
        if held is not None:
            with suppress(OSError):  # another process removed it
                os.utime(self.directory(content))
        return held

    def _move(self, draft: Path, content: str) -> None:
        place = self.directory(content)
        if self.get(content) is None and place.exists():
            shutil.rmtree(place)  # damaged
        try:
            draft.rename(place)
        except OSError:
            if self.get(content) is None:  # not merely another process that was first
                raise

    def _prune(self) -> None:
        copies = [self.directory(content) for content in self.hashes()]
        drafts = self._root.glob("*.partial")  # of processes that were killed, maybe
        for old in [*sorted(copies, key=last_used)[: -self.KEEP], *drafts]:
            with suppress(FileNotFoundError):  # another process has renamed it
                # What is being written is as old as its newest file.
                used = max(map(last_used, [old, *old.glob("*")]))
                if time.time() - used >= self.UNUSED_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)


def _read(directory: Path, content: str) -> tuple[dict[str, Tensor], str] | None:
    """Return tensors and JSON of a copy that has this hash, or None."""
    try:
        text = (directory / "package.json").read_text(encoding="utf-8")
        tensors = load_file(directory / "weights")
        if package_hash(tensors, text) != content:
            return None
        for name, body in json.loads(text)["files"].items():
            if (directory / "processor" / name).read_bytes() != base64.b64decode(body):
                return None
    except (OSError, ValueError, SafetensorError):  # gone, no UTF-8, cut
        return None
    return tensors, text
