"""Encode a data set once, into shards that training reads instead of encoding every sample in every epoch.

Shards do not depend on each other and are dealt to processes of one thread each. A shard is written whole or not at
all, and is the same whoever writes it and when: what was killed is gone on with by the same call, and what was damaged
since is made anew.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .config import DitkitError, differences, from_json
from .data.prepared import CODEC, INDEX, Prepared, places, problem, read_codec, read_index, read_text_encoder
from .files import TEMPORARY, atomic_write, held
from .recipe import Recipe
from .shards import Job, Task, file_entry, packed

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
    """Encode the data of a recipe by its codec into a folder, and its captions by the text encoder of the recipe's
    conditioner, if it has one. True if all is done.

    dtype: of latents and of captions' states, float16 or float32. shard: samples in a shard; a kill loses at most one
    shard for each worker. batch: samples that are encoded at a time. workers: processes, of one thread each, on the
    recipe's `train.device`. A folder that was begun is gone on with, and its shards are compared with their hashes.
    False: Ctrl-C came, and the same call goes on. Raises DitkitError for data and codecs that cannot be prepared, for a
    folder that holds something else, and when the disk is full.
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
    job = Job.planned(recipe, data, codec.fitted(data), dtype, shard, batch)
    with held(folder / ".lock") as mine:
        if not mine:
            raise DitkitError(f"another process is preparing {folder}: wait for it, or stop it")
        if read_index(folder) != old:  # between the first look and the lock
            raise DitkitError(f"another process has prepared {folder} meanwhile: repeat the command")
        if old is None:
            if learned := job.codec.state():
                atomic_write(folder / CODEC, packed(learned))
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


def _text(index: Mapping[str, Any]) -> str:
    return json.dumps(index, indent=1) + "\n"


def _record(folder: Path, task: Task) -> Path:
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


def _kept(folder: Path, old: Mapping[str, Any] | None, job: Job) -> dict[str, dict[str, Any]]:
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


def _space(folder: Path, job: Job, done: Mapping[str, Any]) -> None:
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


def _write(folder: Path, job: Job, task: Task, tick: Callable[[int], Any]) -> dict[str, Any]:
    """Make a shard and its record; the entry of the index."""
    content = job.content(task, tick)
    entry = {**file_entry(task.file, content), "count": task.last - task.first}
    atomic_write(folder / task.file, lambda path: path.write_bytes(content))
    atomic_write(_record(folder, task), json.dumps(entry) + "\n")
    return entry


def _made(
    folder: Path, job: Job, tasks: Sequence[Task], workers: int, quiet: bool, done: dict[str, dict[str, Any]]
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
    folder: Path, job: Job, tasks: Sequence[Task], workers: int, tick: Callable[[int], Any]
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
        encoder = read_text_encoder(folder, index)
        job = Job(data, read_codec(folder, index).inner, index, torch.device(device), encoder)
        while (task := todo.get()) is not None:
            said.put(("made", _write(folder, job, task, tick)))
    except Exception as error:
        said.put(("failed", error if isinstance(error, DitkitError) else RuntimeError(f"in a worker: {error!r}")))
