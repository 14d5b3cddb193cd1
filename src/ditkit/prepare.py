"""Encode a data set once, into shards that training reads instead of encoding every sample in every epoch.

Shards do not depend on each other and are dealt to processes of one thread each. A shard is written whole or not at
all, and is the same whoever writes it and when: what was killed is gone on with by the same call, and what was damaged
since is made anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import queue
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from .codecs import Codec, Latents, Posterior
from .config import DitkitError, differences, from_json, to_json
from .data import Dataset, Split
from .data.prepared import CODEC, FORMAT, INDEX, Prepared, places, problem, read_codec, read_index
from .files import TEMPORARY, atomic_write, held
from .recipe import Recipe, device_of
from .rng import Draw

__all__ = ["prepare"]

DTYPES = ("float16", "float32")


def prepare(
    recipe: Recipe,
    folder: str | Path,
    *,
    dtype: str = "float16",
    shard: int = 1024,
    batch: int = 16,
    workers: int = 1,
    quiet: bool = False,
) -> bool:
    """Encode the data of a recipe by its codec into a folder. True if all is done.

    dtype: of the latents, float16 or float32. shard: samples in a shard; a kill loses at most one shard for each
    worker. batch: samples that are encoded at a time. workers: processes, of one thread each, on the recipe's
    `train.device`. A folder that was begun is gone on with, and its shards are compared with their hashes. False:
    Ctrl-C came, and the same call goes on. Raises DitkitError for data and codecs that cannot be prepared, for a folder
    that holds something else, and when the disk is full.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise DitkitError(f"latents are stored as {' or '.join(DTYPES)}, not as {dtype!r}")
    if min(shard, batch, workers) < 1:
        raise DitkitError(f"shard, batch and workers are at least 1, not {shard}, {batch} and {workers}")
    if isinstance(recipe.data, Prepared):
        raise DitkitError(f"{recipe.data.path} is prepared already: give the data it was made of")
    old = read_index(folder)
    if old is None and (found := _foreign(folder)):
        raise DitkitError(f"{folder} is not empty and holds no prepared data (but {found[0]}): choose another --out")
    data = recipe.data.open()
    codec = recipe.codec
    if old is not None and old["source"] == data.source and from_json(old["codec"], str(folder / INDEX)).inner == codec:
        codec = read_codec(folder, old).inner  # what it learned is not learned anew: the same shards on any machine
    job = _Job.planned(recipe, data, codec.fitted(data), dtype, shard, batch)
    with held(folder / ".lock") as mine:
        if not mine:
            raise DitkitError(f"another process is preparing {folder}: wait for it, or stop it")
        if old is None:
            if learned := job.codec.state():
                atomic_write(folder / CODEC, _packed(learned))
            atomic_write(folder / INDEX, _text(job.index))
        else:
            _same(folder, old, job.index)
        done = _kept(folder, old, job)
        _space(folder, job, done)
        missing = [task for task in job.tasks if task.file not in done]
        if not _made(folder, job, missing, workers, quiet, done):
            return False
        for name, part in job.index["splits"].items():
            part["shards"] = [done[task.file] for task in job.tasks if task.split == name]
        atomic_write(folder / INDEX, _text({**job.index, "complete": True}))
        for task in job.tasks:
            _record(folder, task).unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class _Task:
    """One shard: samples first..last-1 of a split."""

    split: str
    file: str
    first: int
    last: int


@dataclass(frozen=True)
class _Job:
    """What is encoded, and the index of it without its shards."""

    data: Dataset
    codec: Codec
    index: dict[str, Any]
    device: torch.device

    @classmethod
    def planned(cls, recipe: Recipe, data: Dataset, codec: Codec, dtype: str, shard: int, batch: int) -> _Job:
        """Raises DitkitError for data and codecs that cannot be prepared."""
        if codec.vocab:
            raise DitkitError(f"{data.name} is encoded to tokens, which are as small as the data: train on it as it is")
        if not len(data.train):
            raise DitkitError(f"{data.name} has no training samples")
        device = device_of(recipe.train.device)
        codec.shape(data.shape)
        one = data.train.batch(torch.zeros(1, dtype=torch.int64))
        if not isinstance(codec, Posterior) and (drawn := _draws(lambda rng: codec.encode(one.data.to(device), rng))):
            raise DitkitError(f"the codec draws {drawn[0]!r} and does not say from what: it cannot be prepared")
        _, moments, *latent = _moments(codec, one.data.to(device)).shape
        mirrors = _mirrors(data.train, data.name)
        splits = {}
        for name, split in (("train", data.train), ("heldout", data.heldout)):
            versions = 2 if mirrors and name == "train" else 1
            arrays = {"latents": {"dtype": dtype, "shape": [versions, moments, *latent]}}
            if one.label is not None:
                arrays["label"] = {"dtype": "int64", "shape": []}
            if one.text is not None:
                arrays["text"] = {"dtype": "int32", "shape": list(one.text.shape[1:])}
            splits[name] = {"count": len(split), "arrays": arrays, "shards": []}
        learned = codec.state()
        index = {
            "format": FORMAT,
            "complete": False,
            "name": data.name,
            "source": data.source,
            "classes": list(data.classes),
            "captions": data.captions,
            "data": to_json(recipe.data),
            "codec": to_json(Latents(codec, tuple(data.shape), moments)),
            "learned": _entry(CODEC, _packed(learned)) if learned else None,
            "dtype": dtype,
            "shard": shard,
            "batch": batch,
            "splits": splits,
        }
        return cls(data, codec, index, device)

    @property
    def tasks(self) -> list[_Task]:
        """All shards, in order."""
        size = self.index["shard"]
        return [
            _Task(name, f"{name}-{number:05d}.bin", first, min(first + size, part["count"]))
            for name, part in self.index["splits"].items()
            for number, first in enumerate(range(0, part["count"], size))
        ]

    @torch.no_grad()
    def content(self, task: _Task, tick: Callable[[int], Any]) -> bytearray:
        """The bytes of a shard; tick(n) after each n samples. Raises DitkitError for what float16 cannot hold."""
        arrays = self.index["splits"][task.split]["arrays"]
        where, size = places(arrays, task.last - task.first)
        content = bytearray(size)
        whole = {
            name: np.frombuffer(content, np.uint8)[a:b].view(arrays[name]["dtype"]).reshape(-1, *arrays[name]["shape"])
            for name, (a, b) in where.items()
        }
        split: Split = self.data.train if task.split == "train" else self.data.heldout
        for first in range(task.first, task.last, self.index["batch"]):
            ids = torch.arange(first, min(first + self.index["batch"], task.last))
            rows = slice(first - task.first, first - task.first + len(ids))
            found = split.batch(ids)
            images = found.data.to(self.device)
            versions = [images, images.flip(-1)][: arrays["latents"]["shape"][0]]
            for version, data in enumerate(versions):
                moments = _moments(self.codec, data).float().cpu().numpy()
                with np.errstate(over="ignore"):
                    whole["latents"][rows, version] = moments
                if not np.isfinite(whole["latents"][rows, version]).all():
                    largest = float(np.abs(moments).max())
                    raise DitkitError(
                        f"latents of samples {first}..{int(ids[-1])} of the {task.split} split are as large as "
                        f"{largest:g}, which {arrays['latents']['dtype']} cannot hold: choose --dtype float32"
                    )
            for name, values in (("label", found.label), ("text", found.text)):
                if values is not None:
                    whole[name][rows] = values.numpy()
            tick(len(ids))
        return content


def _moments(codec: Codec, data: Shaped[Tensor, "b *sample"]) -> Float[Tensor, "b m *latent"]:
    return codec.moments(data) if isinstance(codec, Posterior) else codec.encode(data)[:, None]


class _Asking:
    """Draws that remember what was asked for; each is everywhere the same number."""

    def __init__(self, count: int, value: float):
        self.count, self.value, self.names = count, value, list[str]()

    def at(self, step: int, sample_ids: Tensor | None = None) -> _Asking:
        return self

    def __call__(self, name: str, law: Any, shape: Sequence[int] = ()) -> Tensor:
        self.names.append(name)
        return torch.full((self.count, *shape), self.value)


def _draws(run: Callable[[Draw], Any], value: float = 0.5) -> list[str]:
    """The names of the draws that an operation on one sample asks for."""
    asking = _Asking(1, value)
    run(asking)
    return asking.names


def _mirrors(split: Split, name: str) -> bool:
    """Whether training mirrors images left to right. Raises DitkitError for another augmentation."""
    one = torch.zeros(1, dtype=torch.int64)
    names = _draws(lambda rng: split.batch(one, rng))
    if not names:
        return False
    mirrored = split.batch(one, _Asking(1, 0.0)).data
    if names != ["flip"] or not torch.equal(mirrored, split.batch(one).data.flip(-1)):
        raise DitkitError(f"{name} is augmented by {', '.join(names)}; only mirroring left to right can be prepared")
    return True


def _packed(learned: Mapping[str, Tensor]) -> bytes:
    return save({name: value.cpu().contiguous() for name, value in learned.items()})


def _entry(file: str, content: bytes | bytearray) -> dict[str, Any]:
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _text(index: Mapping[str, Any]) -> str:
    return json.dumps(index, indent=1) + "\n"


def _record(folder: Path, task: _Task) -> Path:
    """Where the entry of a shard is kept until the index is finished."""
    return folder / f"{task.file}.json"


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that are neither the lock's nor the leftovers of a crash."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [folder.name]
    mine = (".lock", CODEC)  # the codec is written before the index
    return sorted(p.name for p in folder.iterdir() if p.name not in mine and not p.name.startswith(TEMPORARY))


def _same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises DitkitError if a folder was begun with something else."""

    def plain(index: Mapping[str, Any]) -> dict[str, Any]:
        splits = {name: {**part, "shards": []} for name, part in index["splits"].items()}
        return {"type": "index", **index, "complete": False, "splits": splits}

    before, now = plain(old), plain(new)
    changed = [name for name in now if before.get(name) != now[name]]
    for name in changed:
        said = differences(before.get(name), now[name], name)
        raise DitkitError(f"{folder} was prepared otherwise: {said[0] if said else name}; choose another --out")


def _kept(folder: Path, old: Mapping[str, Any] | None, job: _Job) -> dict[str, dict[str, Any]]:
    """The entries of the shards that are there and sound; what is left of others is removed."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        leftover.unlink()
    listed = {} if old is None else {s["file"]: s for part in old["splits"].values() for s in part["shards"]}
    kept = {}
    for task in job.tasks:
        entry = listed.get(task.file)
        record = _record(folder, task)
        if entry is None and record.is_file():
            try:
                entry = json.loads(record.read_text())
            except ValueError:
                entry = None
        if entry is None:
            continue
        if (wrong := problem(folder, entry)) is None:
            kept[task.file] = entry
        else:
            print(f"{task.file} {wrong}: it is made anew", file=sys.stderr)
    return kept


def _space(folder: Path, job: _Job, done: Mapping[str, Any]) -> None:
    """Raises DitkitError if the disk cannot hold what is missing."""
    needed = sum(
        places(job.index["splits"][task.split]["arrays"], task.last - task.first)[1]
        for task in job.tasks
        if task.file not in done
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DitkitError(
            f"the shards need {needed / 1e9:.3g} GB more, and the disk of {folder} has {free / 1e9:.3g} GB free"
        )


def _write(folder: Path, job: _Job, task: _Task, tick: Callable[[int], Any]) -> dict[str, Any]:
    """Make a shard and its record; the entry of the index."""
    content = job.content(task, tick)
    entry = {**_entry(task.file, content), "count": task.last - task.first}
    atomic_write(folder / task.file, lambda path: path.write_bytes(content))
    atomic_write(_record(folder, task), json.dumps(entry) + "\n")
    return entry


def _made(
    folder: Path, job: _Job, tasks: Sequence[_Task], workers: int, quiet: bool, done: dict[str, dict[str, Any]]
) -> bool:
    """Make the missing shards, here or in processes, and note their entries in `done`. False after Ctrl-C."""
    total = sum(task.last - task.first for task in job.tasks)
    before = total - sum(task.last - task.first for task in tasks)
    bar = tqdm(total=total, initial=before, unit="sample", desc="encoding", disable=quiet or None, dynamic_ncols=True)
    try:
        with bar:
            if workers == 1 or len(tasks) <= 1:
                with _one_thread():
                    for task in tasks:
                        done[task.file] = _write(folder, job, task, bar.update)
            else:
                for file, entry in _dealt(folder, job, tasks, min(workers, len(tasks)), bar.update):
                    done[file] = entry
    except KeyboardInterrupt:
        return False
    return True


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are the same whoever takes them: here as in a process of many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _dealt(
    folder: Path, job: _Job, tasks: Sequence[_Task], workers: int, tick: Callable[[int], Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files and entries of shards as processes finish them. Raises what went wrong in one; then all are ended."""
    context = multiprocessing.get_context("spawn")  # torch's threads and a GPU do not survive a fork
    todo, said = context.Queue(), context.Queue()
    for task in (*tasks, *[None] * workers):
        todo.put(task)
    processes = [
        context.Process(target=_work, args=(folder, str(job.device), todo, said), daemon=True) for _ in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        left = len(tasks)
        while left:
            try:
                what, value = said.get(timeout=0.5)
            except queue.Empty:
                ended = [p for p in processes if p.exitcode not in (None, 0)]
                if ended:
                    raise DitkitError(
                        f"a worker died (exit status {ended[0].exitcode}), perhaps for want of memory: repeat the "
                        "command to go on, with fewer --workers or a smaller --batch"
                    ) from None
                continue
            if what == "failed":
                raise value
            if what == "encoded":
                tick(value)
            else:
                left -= 1
                yield value["file"], value
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(folder: Path, device: str, todo: Any, said: Any) -> None:
    """One process: opens the data, and makes shards until there are none, or until the first process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them, and the first one ends the others
    parent = multiprocessing.parent_process()

    def tick(count: int) -> None:
        if parent is not None and not parent.is_alive():  # killed: what goes on after it must find nobody at work
            sys.exit(1)
        said.put(("encoded", count))

    try:
        torch.set_num_threads(1)
        index = read_index(folder)
        assert index is not None
        data = from_json(index["data"]).open()
        if data.source != index["source"]:
            raise DitkitError(f"the data has changed: it was {index['source']}, it is {data.source}")
        job = _Job(data, read_codec(folder, index).inner, index, torch.device(device))
        while (task := todo.get()) is not None:
            said.put(("made", _write(folder, job, task, tick)))
    except Exception as error:
        said.put(("failed", error if isinstance(error, DitkitError) else RuntimeError(f"in a worker: {error!r}")))
