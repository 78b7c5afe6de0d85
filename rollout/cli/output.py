"""Where `rollout generate` puts results: in the order of the prompts, and under a file's name only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError, RolloutError
from .prompts import PromptRecord

Results = list[dict[str, Any]]


def partial_path(path: Path) -> Path:
    """Where the results are until all of them are there."""
    return path.with_name(path.name + ".partial")


def check_output(path: Path, *, resume: bool) -> None:
    """`ConfigError` for a file that cannot be written, before hours of work, or one whose work would be lost."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(
            f"--output: got the folder {str(path)!r}, expected a file; name one in it"
        )
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--output: got {str(path)!r}, expected a file in a folder that can be written to; look at {folder}"
        )
    unfinished = partial_path(path)
    if unfinished.exists() and not resume:
        raise ConfigError(
            f"--output: got unfinished results in {unfinished}, expected none; pass --resume to go on with them, or "
            "remove the file"
        )


@contextmanager
def results_file(path: Path, kept_bytes: int) -> Iterator[TextIO]:
    """The unfinished file, cut to its first `kept_bytes` and open for more; it gets its name if all goes well."""
    unfinished = partial_path(path)
    with unfinished.open("a", encoding="utf-8") as out:
        out.truncate(kept_bytes)
        yield out
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(path)


def finished_records(
    path: Path, records: Sequence[PromptRecord], num_samples: Sequence[int]
) -> tuple[int, int]:
    """How many records the unfinished file has whole, and how many bytes they take.

    `ConfigError` when it holds the results of other prompts.
    """
    unfinished = partial_path(path)
    if not unfinished.exists():
        return 0, 0
    done = kept = size = 0
    lines: list[bytes] = []
    for line in unfinished.read_bytes().splitlines(keepends=True):
        if done == len(records) or not line.endswith(b"\n"):
            break
        _check_belongs(line, records[done], unfinished)
        lines.append(line)
        size += len(line)
        if len(lines) == num_samples[done]:
            done, kept, lines = done + 1, size, []
    return done, kept


def _check_belongs(line: bytes, record: PromptRecord, path: Path) -> None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or any(
        found.get(key) != value for key, value in record.given.items()
    ):
        raise ConfigError(
            f"--resume: got results of other prompts in {path}, expected those of {record.source}; use the same input "
            "and options as before, or remove the file"
        )


class Writer:
    """Writes results in the order of the prompts, whatever the order in which they come."""

    def __init__(self, out: TextIO, *, pretty: bool) -> None:
        self.pretty = pretty
        self._out = out
        self._early: dict[int, tuple[PromptRecord, Results]] = {}
        self._next = 0
        self.num_samples = 0
        self.num_tokens = 0

    def write(self, index: int, record: PromptRecord, samples: Results) -> None:
        """Take the samples of the record at `index`."""
        self.num_samples += len(samples)
        self.num_tokens += sum(len(sample["output_ids"]) for sample in samples)
        self._early[index] = (record, samples)
        try:
            while self._next in self._early:
                self._emit(*self._early.pop(self._next))
                self._next += 1
            self._out.flush()
        except BrokenPipeError:  # who reads has seen enough
            raise
        except OSError as error:
            raise RolloutError(
                f"cannot write results: got {error}, expected room for them; free some, and with --output go on with "
                "what is there: --resume"
            ) from error

    def _emit(self, record: PromptRecord, samples: Results) -> None:
        for number, sample in enumerate(samples):
            if self.pretty:
                self._out.write(_for_people(record, number, sample))
            else:
                line = {**record.extra, **record.given, "sample": number, **sample}
                self._out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _for_people(record: PromptRecord, number: int, sample: dict[str, Any]) -> str:
    reason = (sample["meta_info"]["finish_reason"] or {}).get("type")
    title = record.prompt or record.extra.get("messages") or record.input_ids
    head = f"── {title}" if number == 0 else f"── sample {number + 1}"
    text = f"{head}  [{len(sample['output_ids'])} tokens, {reason}]\n"
    text += f"{sample['text'] or sample['output_ids']}\n"
    logprobs = sample["meta_info"].get("output_token_logprobs")
    if logprobs:
        shown = (
            f"{word if word is not None else token!r} {value:.2f}"
            for value, token, word in logprobs
        )
        text += f"   {' | '.join(part.replace(chr(10), '⏎') for part in shown)}\n"
        text += (
            f"   sum of {len(logprobs)} log-probabilities: {sum(v for v, _, _ in logprobs):.3f}\n"
        )
    return text + "\n"
