"""Which image files can be decoded: found out once, by one process, and remembered."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

_CHUNK = 4096


def is_readable(file: Path, resolution: int) -> bool:
    """True if Pillow decodes every byte of the file; JPEGs at no more than `resolution` needs."""
    try:
        with Image.open(file) as image:
            # JPEG only: decodes at reduced scale, several times faster, yet reads every byte.
            image.draft("RGB", (resolution, resolution))
            image.load()
    except Exception:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and their own.
        return False
    return True


def verify_files(files: Sequence[Path], resolution: int) -> list[bool]:
    """`is_readable` of every file, in threads."""
    readable: list[bool] = []
    bar = tqdm(total=len(files), desc="checking images", unit="img", leave=False, disable=None)
    # Pillow decodes outside the interpreter lock; the chunks bound the number of futures.
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            for ok in pool.map(is_readable, chunk, [resolution] * len(chunk)):
                readable.append(ok)
                bar.update()
    return readable


class SharedVerifier:
    """`verify_files` by the main process alone; the others wait for its verdict.

    The verdict holds for these names, sizes and times of change. `save` writes it to a file, from
    which the next run takes it unless a file was added, removed or changed.

    Args:
        accelerator: of the run.
        file: of the verdict; read if it is there.
    """

    def __init__(self, accelerator: Accelerator, file: Path):
        self._accelerator = accelerator
        self._file = file
        self._verdict: dict[str, object] | None = None

    def __call__(self, files: Sequence[Path], resolution: int) -> list[bool]:
        verdict: list[list[int] | None] = [None]
        if self._accelerator.is_main_process:
            verdict = [self._broken(files, resolution)]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(verdict)
        broken = set(verdict[0] or [])
        return [index not in broken for index in range(len(files))]

    def _broken(self, files: Sequence[Path], resolution: int) -> list[int]:
        """Indices of the files that cannot be read."""
        digest = _digest(files)
        known = self._read()
        if known.get("digest") == digest:
            self._verdict = None  # written already
            return known["broken"]
        readable = verify_files(files, resolution)
        broken = [index for index, ok in enumerate(readable) if not ok]
        self._verdict = {"digest": digest, "broken": broken}
        return broken

    def _read(self) -> dict:
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}

    def save(self) -> None:
        """Writes a new verdict; on the main process, which alone has one."""
        if self._verdict is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._verdict))
        partial.replace(self._file)


def _digest(files: Sequence[Path]) -> str:
    """Of the files' names, sizes and times of change, in order."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()
