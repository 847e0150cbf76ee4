"""Step 2's work: a vector and a word sequence for every text, in files that a stopped step resumes with."""

import os
import time
from pathlib import Path

import numpy as np

from pipeline.files import open_array, read_json, write_json
from pipeline.processes import cores
from pipeline.progress import ProgressBar
from pipeline.schema import Settings
from text_space.doc2vec import embed_batches, text_batches

TEXTS_WORTH_A_PROCESS = 5000
"""A process takes two seconds to start, and places some 2,000 texts a second."""


SAVE_EVERY = 20.0
"""Seconds between two saves. A stopped step resumes from the last one."""


def embed_all(settings: Settings, count: int, unfinished: Path, vectors_path: Path) -> None:
    """Write vectors and words of WORK's `count` texts, and resume with what is there.

    The vectors (float32, count x d) go to `vectors_path`. In `unfinished` are `lengths.npy` (int64, count),
    `tokens.bin` (int32, bare), and `done.json`: how many texts and tokens of these are valid.
    """
    processes = min(cores(), 1 + count // TEXTS_WORTH_A_PROCESS)
    done_file, tokens_file = unfinished / "done.json", unfinished / "tokens.bin"
    resumed = done_file.is_file()
    done = read_json(done_file) if resumed else {"texts": 0, "tokens": 0}
    vectors_path.parent.mkdir(parents=True, exist_ok=True)
    vectors = open_array(vectors_path, (count, settings.doc2vec.vector_size), np.float32, resumed)
    lengths = open_array(unfinished / "lengths.npy", (count,), np.int64, resumed)
    texts = text_batches(settings.work_folder, skip=done["texts"])
    batches = embed_batches(settings, texts, processes, folder=unfinished)  # where a kill leaves nothing for long
    saved = time.monotonic()
    with (
        tokens_file.open("r+b" if resumed else "wb") as tokens,
        ProgressBar(total=count, initial=done["texts"], desc="vectors", unit="text") as progress,
    ):
        tokens.truncate(done["tokens"] * np.dtype(np.int32).itemsize)
        tokens.seek(0, os.SEEK_END)
        for batch in batches:
            start, end = done["texts"], done["texts"] + len(batch.vectors)
            vectors[start:end], lengths[start:end] = batch.vectors, batch.lengths
            tokens.write(batch.tokens.tobytes())  # numpy's tofile does not say that the disk is full
            done = {"texts": end, "tokens": done["tokens"] + len(batch.tokens)}
            if end == count or time.monotonic() - saved >= SAVE_EVERY:
                for part in (vectors, lengths, tokens):
                    part.flush()
                write_json(done_file, done)
                saved = time.monotonic()
            progress.update(len(batch.vectors))
