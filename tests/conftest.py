"""Small prepared datasets for the tests, made once by the real scripts."""

import functools
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import script_process
import torch
from hypothesis import settings as property_settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]

# What a shell runs in the background ignores Ctrl-C, and so do the processes it starts. Some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the tests are small: threads would only wait for each other

# The same examples every time. How long one takes depends on what else the machine does, so there is no deadline.
property_settings.register_profile("quick", max_examples=25, derandomize=True, deadline=None, database=None)
property_settings.register_profile("full", max_examples=1000, derandomize=True, deadline=None, database=None)
property_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A made-up dataset so small that every step takes a second or two.
TINY = ["--config", str(ROOT / "tests" / "tiny.yaml")]
WITHOUT_STEPS_1_TO_3 = """
import runpy, sys
sys.modules.update(dict.fromkeys(("gensim", "nmslib", "faiss", "nltk")))  # importing one of them fails
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program that runs a script where the libraries of steps 1 to 3 are missing. Its first argument is ROOT."""


@functools.cache
def with_libraries() -> Any:
    """What starts processes of one thread that have the libraries imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(script_process.LIBRARIES)
    with unittest.mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


def run_script(
    script: str, *words: str | Path, ok: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does; with `ok`, fail the test where it does not exit with 0.

    It runs in a fork of a process that has the libraries imported already, with an `environment` of its own in one that
    has not: anew in everything, the seed of Python's hashes too.
    """
    command = [str(ROOT / script), *map(str, words)]
    if environment:
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    else:
        with (
            tempfile.NamedTemporaryFile("r+", newline="") as stdout,
            tempfile.NamedTemporaryFile("r+", newline="") as stderr,
        ):
            process = with_libraries().Process(
                target=script_process.run, args=(command, str(ROOT), stdout.name, stderr.name)
            )
            process.start()
            process.join()
            done = subprocess.CompletedProcess(
                [sys.executable, *command], process.exitcode, stdout.read(), stderr.read()
            )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a script that ended in a user's mistake: one line on stderr, exit code 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def prepare(work: Path, *words: str) -> None:
    """Steps 0 to 3 on the tiny dataset, and its images' features, so that not every test computes them."""
    for script in (
        "prepare_dataset.py",
        "train_doc2vec.py",
        "extract_doc2vec_vectors.py",
        "knn_document_features.py",
        "extract_image_features.py",
    ):
        run_script(script, *TINY, "--work", work, *words)


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORK after steps 0 to 3; not to be changed."""
    work = tmp_path_factory.mktemp("prepared") / "work"
    prepare(work)
    return work


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    """A copy of WORK after steps 0 to 3, to do anything with; its images stay where they are."""
    work = tmp_path / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    return work


@pytest.fixture(scope="session")
def browser() -> Iterator["Chrome"]:
    """Headless Chromium that notes what pages write to its console."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not both here (Debian: chromium, chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    # Chromium has no sandbox for root, and a container's /dev/shm is too small for it.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def page_problems(browser: "Chrome") -> list[str]:
    """What is wrong with the page in the browser: messages on its console since the last call, images that do not
    load, whatever was loaded from elsewhere, and a page wider than the window."""
    # Images outside the window may be loaded only when they come into it.
    broken = browser.execute_async_script(
        """const done = arguments[0], images = [...document.images];
        images.forEach(image => image.loading = "eager");
        Promise.allSettled(images.map(image => image.decode())).then(all => done(
            images.filter((image, place) => all[place].status === "rejected" || !image.naturalWidth)
                .map(image => `cannot show ${image.src}`)));"""
    )
    origin = browser.execute_script("return location.origin")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    foreign = [f"loaded {name}" for name in loaded if not name.startswith((origin, "data:"))]
    wide = browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
    console = [entry["message"] for entry in browser.get_log("browser")]
    return broken + foreign + console + ["too wide"] * wide
