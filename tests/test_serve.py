"""The playground: its command, its limits, and its page in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from engine import serve
from tests.forked import train
from tests.runs import ROOT, environment, run_folder, toy

PICTURES = "[...document.querySelectorAll('.picture img')].filter(i => i.offsetParent)"
UPLOAD_MB = 0.5
# gradio's page asks for the progress of an upload that it refused to begin, and logs the answer
HARMLESS = ("Failed to load resource: the server responded with a status of 404", "Response")


def trained(folder: Path, name: str) -> Path:
    """The run directory of a toy run."""
    flags = [*toy(name)[1], "--steps", "2", "--samples", "4", "--device", "cpu"]
    train(name, *flags, "--compile", "off", "--runs", str(folder))
    return run_folder(folder, name)


@contextmanager
def served(
    run: Path, end: signal.Signals, *flags: str, said: list[str] | None = None
) -> Iterator[str]:
    """A server's address; ended by a signal, it leaves well and nothing behind. `said` gets what
    it printed after the address."""
    with tempfile.TemporaryDirectory() as temporary:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.serve", str(run), "--device", "cpu", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment(TMPDIR=temporary),
        )
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert address, line + process.stdout.read()
            yield address[0]
        finally:
            process.send_signal(end)
            output = process.communicate(timeout=30)[0]
        assert process.returncode == 0, output
        # gradio prints a traceback of its own where what it is sent is no number at all
        assert output.endswith("ended\n") and f"{ROOT}/engine" not in output
        assert not list(Path(temporary).glob("saddle-serve-*"))
        if said is not None:
            said.append(output)


@pytest.fixture(scope="module")
def gan_run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("gan"), "dcgan_digits")


@pytest.fixture(scope="module")
def gan(gan_run) -> Iterator[str]:
    """Address of a GAN's page."""
    with served(gan_run, signal.SIGINT) as address:
        yield address


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Iterator[str]:
    """Address of an autoencoder's page."""
    run = trained(tmp_path_factory.mktemp("vae"), "vae_mnist")
    with served(run, signal.SIGTERM, "--max-upload-mb", str(UPLOAD_MB)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        assert not os.environ.get("CI"), "CI needs chromium: apt-get install chromium"
        pytest.skip("no chromium here: the page is not looked at in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    """A page that reaches this machine alone; it must have asked for nothing else, found what it
    asked for, and said nothing worse than a warning."""
    fresh = browser.new_page(viewport={"width": 1200, "height": 900})
    asked, missing, errors = set(), [], []
    fresh.on("request", lambda request: asked.add(request.url))
    fresh.on("response", lambda r: missing.append(r.url) if r.status >= 400 else None)
    fresh.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    fresh.on("pageerror", lambda error: errors.append(str(error)))
    own = re.compile(r"(http://127\.0\.0\.1:\d+/|data:|blob:http://127\.0\.0\.1)")
    fresh.route(lambda url: not own.match(url), lambda route: route.abort())
    fresh.set_default_timeout(30_000)
    yield fresh
    fresh.close()
    assert not [url for url in asked if not own.match(url)]
    assert not [url for url in missing if "/upload_progress?" not in url]
    assert not [text for text in errors if not (missing and text.startswith(HARMLESS))]


def pictures(page, name: str) -> list[bytes]:
    """The files behind the visible pictures, once the first of them has this in its name."""
    ready = f"{PICTURES}.length && {PICTURES}[0].src.includes('{name}')"
    page.wait_for_function(f"{ready} && {PICTURES}.every(i => i.complete && i.naturalWidth > 0)")
    return [page.request.get(url).body() for url in page.evaluate(f"{PICTURES}.map(i => i.src)")]


def opened(content: bytes, folder: Path) -> Image.Image:
    path = folder / "content"
    path.write_bytes(content)
    return Image.open(path)


# the page


def test_a_gans_page_makes_the_same_pictures_for_a_seed_and_walks(gan, page, tmp_path):
    page.goto(gan)
    pictures(page, "seed0-16")  # the page comes with some
    assert [tab.inner_text() for tab in page.get_by_role("tab").all()] == ["Samples", "Walk"]
    assert "dcgan_digits" in page.title()
    made = []
    for seed in ("3", "4", "3"):
        page.get_by_label("Seed").first.fill(seed)
        page.get_by_role("button", name="Generate").click()
        made.append(pictures(page, f"seed{seed}-16")[0])
    assert made[0] == made[2] != made[1]
    assert opened(made[0], tmp_path).text["Saddle seed"] == "3"
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").or_(
            page.get_by_role("button", name="Download PNG")
        ).first.click()
    assert download.value.suggested_filename == "dcgan_digits-seed3-16.png"
    assert download.value.path().read_bytes() == made[0]

    page.get_by_role("tab", name="Walk").click()
    page.get_by_label("To seed").fill("7")
    page.get_by_role("button", name="Walk", exact=True).click()
    motion, strip = pictures(page, "walk-seed0-seed7")
    assert opened(motion, tmp_path).n_frames > 10  # of 46: those that are alike are shown longer
    assert opened(strip, tmp_path).width > 5 * opened(strip, tmp_path).height


def test_a_vaes_page_reconstructs_an_upload_and_says_what_it_refuses(vae, page, tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "mine.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "mine.png").read_bytes()[:60])
    (tmp_path / "large.png").write_bytes(os.urandom(int(UPLOAD_MB * 2**20) + 1))
    page.goto(vae)
    page.get_by_role("tab", name="Reconstruct").click()
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    page.get_by_text("choose an image first").wait_for()
    upload = page.locator("input[type=file]")
    upload.set_input_files(tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    upload.set_input_files(tmp_path / "torn.png")
    page.get_by_text("cannot be read as an image").wait_for()
    page.get_by_label(re.compile("clear|remove", re.I)).first.click()
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    (made,) = pictures(page, "reconstruction")
    assert "compositeWith" in opened(made, tmp_path).text["DigitalSourceType"]
    page.get_by_text("left as the model sees it").wait_for()


def test_a_narrow_page_does_not_scroll_sideways(vae, page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(vae)
    pictures(page, "seed0")
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


# the server, whoever asks


def ask(url: str, content: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request."""
    request = urllib.request.Request(url, content, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def press(address: str, button: int, inputs: list) -> dict:
    """What a request that was not made by the page is answered."""
    join = {"data": inputs, "fn_index": button, "session_hash": "crafted"}
    kind = {"Content-Type": "application/json"}
    status, answer = ask(f"{address}/gradio_api/queue/join", json.dumps(join).encode(), **kind)
    assert status == 200, answer
    _, lines = ask(f"{address}/gradio_api/queue/data?session_hash=crafted")
    messages = [json.loads(x[5:]) for x in lines.decode().splitlines() if x.startswith("data:")]
    (last,) = [m for m in messages if m["msg"] == "process_completed"]
    return last


@pytest.mark.parametrize(
    ("button", "inputs"),
    [
        (0, [0, 10**9, 4]),
        (0, [0, -5, 4]),
        (0, [10**30, 4, 4]),
        (0, ["0; rm -rf /", 4, 4]),
        (0, [0, None, 4]),
        (0, [0, 4, [1]]),
        (1, [0, 1, 10**9]),
        (1, [0, {"a": 1}, 4]),
    ],
)
def test_a_crafted_request_is_refused_and_the_page_lives_on(button, inputs, gan):
    assert not press(gan, button, inputs)["success"]
    assert press(gan, 0, [1, 2, 4])["success"]


def test_nobody_is_given_files_of_the_machine(gan, gan_run):
    for path in ("/etc/passwd", gan_run / "recipe.json", "README.md", "engine/serve.py"):
        assert ask(f"{gan}/gradio_api/file={path}")[0] == 403
    answer = press(gan, 0, [1, 2, 4])["output"]["data"][0]
    assert ask(f"{gan}/gradio_api/file={answer['path']}")[0] == 200


def test_a_file_of_the_machine_is_no_upload(vae):
    for path in ("/etc/passwd", str(ROOT / "README.md")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert not press(vae, 2, [file])["success"]


def test_large_requests_are_refused_before_they_are_read(vae):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(1000) + b"\r\n--x--\r\n"
    assert ask(f"{vae}/gradio_api/upload", body, **form)[0] == 200
    limit = int(UPLOAD_MB * 2**20)
    body = head + bytes(limit + 1) + b"\r\n--x--\r\n"  # the form is within its limit, the file not
    assert ask(f"{vae}/gradio_api/upload", body, **form)[0] == 413
    host, port = vae.removeprefix("http://").split(":")
    for path, header, status in (
        ("upload", f"Content-Length: {2 * limit}", b"413"),
        ("upload", "Transfer-Encoding: chunked", b"411"),
        ("queue/join", f"Content-Length: {2 << 20}", b"413"),
    ):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            lines = (f"POST /gradio_api/{path} HTTP/1.1", "Host: localhost", header, "", "")
            raw.sendall("\r\n".join(lines).encode())
            assert raw.recv(12) == b"HTTP/1.1 " + status


def test_another_sites_name_that_leads_here_is_not_let_in(gan):
    assert ask(gan, Host="evil.example")[0] == 400


# the command


def refused(capsys, code: int, *arguments: object) -> str:
    """The one line that a command fails with."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert serve.main([str(a) for a in arguments]) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_wrong_commands(gan_run, tmp_path, capsys):
    assert "not a run directory" in refused(capsys, 2, tmp_path / "nothing")
    for flags in (
        ("--port", 70000),
        ("--limit", 1),
        ("--max-upload-mb", 0),
        ("--checkpoint", 7),
        ("--checkpoint", "best"),
    ):
        assert flags[0] in refused(capsys, 2, gan_run, *flags)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    for flags in (("--checkpoint", 8), ("--no-ema",)):
        assert f"{flags[0]} needs the run" in refused(capsys, 2, tmp_path / "export", *flags)
    assert "--host" in refused(capsys, 1, gan_run, "--host", "256.0.0.1")


def test_a_run_without_a_checkpoint(gan_run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(gan_run / "recipe.json", tmp_path / "run")
    assert "has no checkpoint yet" in refused(capsys, 1, tmp_path / "run")
    shutil.copy(gan_run / "stats.jsonl", tmp_path / "run")
    assert "checkpoints are gone" in refused(capsys, 1, tmp_path / "run")


def test_a_seed_out_of_bounds_is_a_message_and_nothing_in_the_terminal(gan_run):
    said = []
    with served(gan_run, signal.SIGINT, said=said) as address:
        for button, inputs in ((0, [-5, 4, 4]), (0, [2**32, 4, 4]), (1, [0, -1, 4])):
            answer = press(address, button, inputs)
            assert not answer["success"]
            assert "seed: " in answer["output"]["error"]
            assert "from 0 to 4,294,967,295" in answer["output"]["error"]
    assert said == ["ended\n"]


def test_a_port_in_use_is_named_and_passed_over_where_none_was_asked_for(gan_run, capsys):
    with serve.listen("127.0.0.1", None) as first:
        port = first.getsockname()[1]
        assert f"--port {port}" in refused(capsys, 1, gan_run, "--port", port)
        with serve.listen("127.0.0.1", None) as second:
            assert second.getsockname()[1] > port


def test_without_gradio_the_command_that_installs_it_is_named(gan_run, capsys, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'saddle[serve]'" in refused(capsys, 1, gan_run)
