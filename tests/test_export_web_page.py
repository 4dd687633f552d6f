"""The exported page in headless Chromium: real files, clicks, keys, touches; its masks are compared with PyTorch's."""

import functools
import http.server
import io
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from browsing import MARKS, chromium, sync_api, visits

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.export import sam_onnx, web
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import sam_mini_student
from fmdistill.predict.sam_layouts import LAYOUTS

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "build/onnxruntime-web/package"))
pytestmark = MARKS
needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_dir(), reason="no onnxruntime-web: sh benchmarks/clients/onnxruntime_web.sh downloads it"
)
sync_api.expect.set_options(timeout=120_000)  # a busy machine
expect = sync_api.expect


@pytest.fixture(scope="module")
def student():
    return sam_mini_student("packaged").eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, student):
    """A page of sam_mini, exported as `run` does, with the runtime from npm if it is at hand."""
    out = tmp_path_factory.mktemp("web") / "page"
    pictures = [photograph("chelsea")]
    files = web._runtime_files(str(RUNTIME)) if RUNTIME.is_dir() else []
    export = sam_onnx.SamExport(
        student, student.head, "web", LAYOUTS["onnx"], lambda split, count: pictures, {"title": "sam_mini"}
    )
    further = lambda at: {"page": web.write_page(at, files, web._samples("packaged"))}  # noqa: E731
    return sam_onnx.write(replace(export, further=further), out)


@pytest.fixture(scope="module")
def url(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def opened(browser, url):
    with visits(browser) as visit:
        yield functools.partial(visit, url)


def drop(page, name, data):
    page.evaluate(
        """async ([name, data]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(data)], name));
          dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
        }""",
        [name, list(data)],
    )


def saved(page):
    """Return the mask that the page saves, bool (H, W), once it answered."""
    expect(page.locator("#panel")).to_have_attribute("aria-busy", "false")
    with page.expect_download(timeout=120_000) as download:
        page.locator("#save").click()
    values = np.asarray(PIL.Image.open(download.value.path()).convert("RGB"))
    assert set(np.unique(values)) <= {0, 255}
    return values[..., 0] > 0


@torch.inference_mode()
def expected(student, pixels, points, labels, box=None):
    """Return PyTorch's masks bool (4, H, W) and predicted IoU (4,) of points and a box in shares of the picture."""
    preprocess = SamPreprocess(256, 16)
    prepared, (h, w) = preprocess.prepare(pixels)
    embedding = student(preprocess.normalize(prepared[None], torch.tensor([[h, w]])))["embedding"][0]
    scale = torch.tensor([w, h])
    corners = None if box is None else (torch.tensor([box]) * scale.repeat(2)).float()
    place = (torch.tensor([points]) * scale).float()
    logits, predicted = student.head.decode_all(embedding, place, torch.tensor([labels]), corners)
    return (student.head.upsample(logits, (h, w), pixels.shape[:2])[0] > 0).numpy(), predicted[0]


def iou(one, other):
    assert one.shape == other.shape
    return (one & other).sum() / max(1, (one | other).sum())


@needs_runtime
def test_a_dropped_photograph_and_a_click_give_pytorchs_mask(student, opened):
    page = opened()
    pixels = np.array(PIL.Image.fromarray(photograph("flower")).resize((1500, 1000)))
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    drop(page, "mine.png", file.getvalue())
    expect(page.locator("#name")).to_contain_text("mine.png, 1500 × 1000")
    expect(page.locator("#status")).to_contain_text("Ready")
    area = page.locator("#picture").bounding_box()
    x, y = (round(area[key] + share * area[side]) for key, share, side in (("x", 0.4, "width"), ("y", 0.5, "height")))
    page.mouse.click(x, y)
    expect(page.locator("#status")).to_contain_text("The mask covers")
    points = [[(x - area["x"]) / area["width"], (y - area["y"]) / area["height"]]]
    masks, predicted = expected(student, pixels, points, [1])
    best = 1 + int(predicted[1:].argmax())
    assert 0.001 < masks[best].mean() < 0.9
    assert iou(saved(page), masks[best]) >= 0.98

    left, top = x - 100, y - 80
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(x + 90, y + 70, steps=3)
    page.mouse.up()
    page.mouse.click(left + 10, top + 10, button="right")
    page.get_by_role("combobox", name="Mask").select_option("2")
    share = lambda px, py: [(px - area["x"]) / area["width"], (py - area["y"]) / area["height"]]  # noqa: E731
    points.append(share(left + 10, top + 10))
    box = [*share(left, top), *share(x + 90, y + 70)]
    masks, _ = expected(student, pixels, points, [1, 0], box)
    assert iou(saved(page), masks[2]) >= 0.98
    drop(page, "notes.heic", b"these are notes")
    expect(page.get_by_role("alert")).to_contain_text("notes.heic: this browser cannot decode it; save it as JPEG")


@needs_runtime
def test_a_phone_takes_touches_and_the_keyboard_does_what_the_mouse_does(opened):
    page = opened(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    expect(page.locator("#status")).to_contain_text("Ready")
    area = page.locator("#picture").bounding_box()
    assert area["width"] > 350 and page.evaluate("document.documentElement.scrollWidth") == 390
    page.touchscreen.tap(area["x"] + 0.5 * area["width"], area["y"] + 0.5 * area["height"])
    expect(page.locator("#status")).to_contain_text("The mask covers")
    tapped = saved(page)
    page.keyboard.press("Escape")
    expect(page.locator("#undo")).to_be_disabled()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("#undo")).to_be_enabled()
    assert iou(saved(page), tapped) > 0.9  # the crosshair began in the middle
    page.keyboard.press("Backspace")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#undo")).to_be_enabled()
    page.locator("#samples button").nth(1).click()
    expect(page.locator("#name")).to_contain_text("coffee.jpg")
    expect(page.locator("#undo")).to_be_disabled()


def test_the_pages_arithmetic_is_pils_and_torchs(browser, url):
    page = browser.new_page()
    page.goto(url + "sam.js")
    rng = np.random.default_rng(0)
    for height, width in ((37, 61), (64, 48), (20, 300), (500, 333), (7, 1)):
        pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
        prepared, (h, w) = SamPreprocess(64, 16).prepare(pixels[..., :3].copy())
        resized, size = page.evaluate(
            """async ([data, height, width]) => {
              const sam = await import("/sam.js"), size = sam.resizedSize(height, width, 64);
              return [Array.from(sam.resize(Uint8ClampedArray.from(data), height, width, ...size)), size];
            }""",
            [pixels.ravel().tolist(), height, width],
        )
        assert size == [h, w]
        got = np.array(resized, np.uint8).reshape(h, w, 4)[..., :3]
        assert np.array_equal(got, prepared.numpy()[:, :h, :w].transpose(1, 2, 0))
        logits = torch.from_numpy(rng.normal(size=(1, 1, 16, 16)).astype(np.float32))
        bits = page.evaluate(
            """async ([data, inside, size]) =>
              Array.from((await import("/sam.js")).maskOf(Float32Array.from(data), 16, 64, inside, size))""",
            [logits.ravel().tolist(), [h, w], [height, width]],
        )
        head = type("Head", (), {"config": {"image_size": 64}})
        right = PromptHead.upsample(head, logits, (h, w), (height, width))[0, 0]
        differs = torch.tensor(bits).view(height, width).bool() != (right > 0)
        assert not (differs & (right.abs() > 1e-5)).any()
    page.close()


@needs_runtime
def test_the_runtime_of_the_cdn_is_the_pinned_one(browser, url, folder):
    context = browser.new_context()
    page, asked_for = context.new_page(), []

    def answer(route):
        name = route.request.url.removeprefix(web.CDN)
        asked_for.append(name)
        kind = "application/wasm" if name.endswith(".wasm") else "text/javascript"
        body = (folder / "ort" / name).read_bytes()
        route.fulfill(body=body, content_type=kind, headers={"Access-Control-Allow-Origin": "*"})

    text = (folder / "fmdistill.json").read_text().replace('"ort/"', f'"{web.CDN}"')
    context.route("**/fmdistill.json", lambda route: route.fulfill(body=text, content_type="application/json"))
    context.route("https://cdn.jsdelivr.net/**", answer)
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("Ready")
    assert sorted(asked_for) == sorted(web.RUNTIME_FILES)
    context.close()
