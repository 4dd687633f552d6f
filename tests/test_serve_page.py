"""The page in headless Chromium, with real clicks, keys, touches and files; skipped where there is no Chromium."""

import re
import threading
import time

import clip_run
import pytest
import uvicorn
from browsing import MARKS, chromium, sync_api, visits
from served import clip_folder, sam_runs

from fmdistill.serve import app, bind_address, subjects

FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
pytestmark = MARKS


class Running:
    """An application behind a port of this machine, in a thread, with the prompts that it received."""

    def __init__(self, folders):
        opened = subjects.open_runs(folders, "cpu", trust=True)
        self.listening = bind_address("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn.Config(app.build(opened), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        while not self.server.started:
            time.sleep(0.02)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.listening.close()


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    running = Running(sam_runs(tmp_path_factory.mktemp("sam"), "one", "two"))
    yield running.url
    running.stop()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "zero.yaml").write_text(f"name: zeroshot\nclassnames: {folder}/names.txt\ntemplates: ['a {{}}']\n")
    running = Running([clip_folder(folder, f"protocols=[{folder}/zero.yaml]")])
    yield running.url
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def opened(browser):
    with visits(browser) as visit:
        yield visit


sync_api.expect.set_options(timeout=60_000)  # a busy machine takes longer than the usual five seconds


def expect(locator):
    return sync_api.expect(locator)


def picture(page, number=0):
    """Return a panel's picture once every network has answered, and its box in pixels of the window."""
    expect(page.locator(".numbers").last).to_contain_text("mask")
    expect(page.locator(".numbers").first).to_contain_text("mask")
    canvas = page.locator(".panel canvas").nth(number)
    return canvas, canvas.bounding_box()


def settled(page):
    """Wait until the last prompt was answered and drawn, and return it."""
    page.evaluate(FRAMES)
    expect(page.locator("#panels")).to_have_attribute("aria-busy", "false")
    page.evaluate(FRAMES)
    return page.prompts[-1]


def pixels(page, number=0):
    settled(page)
    return page.locator(".panel canvas").nth(number).evaluate("(canvas) => canvas.toDataURL()")


def test_pointer_clicks_and_boxes_give_masks(sam, opened):
    page = opened(sam)
    canvas, box = picture(page)
    x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(x + 0.25 * width, y + 0.5 * height)
    (point,) = settled(page)["points"]
    assert point == pytest.approx([0.25, 0.5, 1], abs=0.01)  # moving the pointer is enough
    expect(page.locator(".panel .iou").nth(1)).to_have_text(re.compile(r"IoU[01]\.\d\d"))
    expect(page.locator(".panel .iou").first).to_have_text("")
    hovered = pixels(page)
    page.mouse.move(x + 0.75 * width, y + 0.25 * height)
    settled(page)
    assert pixels(page) != hovered
    page.mouse.click(x + 0.5 * width, y + 0.5 * height)
    page.mouse.click(x + 0.8 * width, y + 0.2 * height, button="right")
    assert settled(page)["points"] == [
        pytest.approx([0.5, 0.5, 1], abs=0.01),
        pytest.approx([0.8, 0.2, 0], abs=0.01),
    ]
    page.mouse.move(x + 0.2 * width, y + 0.3 * height)
    page.mouse.down()
    page.mouse.move(x + 0.6 * width, y + 0.7 * height, steps=4)
    page.mouse.up()
    assert settled(page)["box"] == pytest.approx([0.2, 0.3, 0.6, 0.7], abs=0.01)
    page.locator("#undo").click()
    assert settled(page)["box"] is None
    page.locator("#clear").click()
    assert len(settled(page)["points"]) == 1
    expect(page.locator("#clear")).to_be_disabled()


def test_buttons_choose_the_mask_the_label_and_what_is_drawn(sam, opened):
    page = opened(sam)
    canvas, box = picture(page)
    page.get_by_role("button", name="Exclude").click()
    page.mouse.click(box["x"] + 40, box["y"] + 40)
    page.get_by_role("combobox", name="Mask").select_option("3")
    assert settled(page)["mask"] == "3" and settled(page)["points"][0][2] == 0
    shown = pixels(page, 1)
    page.get_by_role("button", name="Differences").click()
    expect(page.locator("#colours")).to_be_hidden()
    plain = pixels(page, 1)
    page.get_by_role("button", name="SRW weights").click()
    expect(page.locator("#scale")).to_contain_text("as one was trained")
    assert len({shown, plain, pixels(page, 1)}) == 3


def test_the_keyboard_does_what_the_mouse_does(sam, opened):
    page = opened(sam)
    picture(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    (point,) = settled(page)["points"]
    assert 0.5 < point[0] < 0.52 and 0.54 < point[1] < 0.56
    page.keyboard.press("Enter")
    page.keyboard.press("n")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Enter")
    assert [label for *_, label in settled(page)["points"]] == [1, 0]
    page.keyboard.press("Backspace")
    assert len(settled(page)["points"]) == 1
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    for key in ("Shift+ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    left, top, right, bottom = settled(page)["box"]
    assert right - left > 0.02 and bottom - top > 0.04
    page.keyboard.press("m")
    expect(page.locator("#choice")).to_have_value("1")
    page.keyboard.press("w")
    expect(page.get_by_role("button", name="SRW weights")).to_have_attribute("aria-pressed", "true")


def test_files_and_samples_open_and_errors_are_read_on_the_page(sam, opened, tmp_path):
    page = opened(sam)
    picture(page)
    page.locator("#samples button").nth(2).click()
    expect(page.locator("#samples button").nth(2)).to_have_attribute("aria-pressed", "true")
    picture(page)
    image, text = tmp_path / "mine.png", tmp_path / "notes.png"
    image.write_bytes(clip_run.picture(0))
    text.write_text("these are notes")
    page.set_input_files("#file", text)
    expect(page.get_by_role("alert")).to_contain_text("notes.png: cannot be decoded")
    page.set_input_files("#file", image)
    expect(page.get_by_role("alert")).to_be_hidden()
    canvas, box = picture(page)
    assert box["width"] / box["height"] == pytest.approx(48 / 40, abs=0.02)
    dropped = """async ([name, data]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([Uint8Array.from(data)], name));
      dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    }"""
    page.evaluate(dropped, ["dropped.png", list(text.read_bytes())])
    expect(page.get_by_role("alert")).to_contain_text("dropped.png: cannot be decoded")


def test_an_image_that_the_server_dropped_is_opened_again(sam, opened):
    page = opened(sam)
    canvas, box = picture(page)
    gone = {"status": 410, "json": {"error": "no longer in memory"}}
    requests = []

    def answer_first(route):
        requests.append(route)
        route.fulfill(**gone) if len(requests) == 1 else route.continue_()

    page.route("**/masks", answer_first)
    page.mouse.click(box["x"] + 50, box["y"] + 50)
    assert len(settled(page)["points"]) == 1 and len(requests) >= 2
    expect(page.locator(".panel .iou").nth(1)).to_contain_text("IoU")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_phone_shows_the_panels_below_each_other_and_takes_touches(sam, opened):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = opened(sam, **phone)
    canvas, box = picture(page)
    _, second = picture(page, 1)
    assert second["y"] > box["y"] + box["height"] and second["x"] == box["x"] and box["width"] > 350
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.25 * box["height"])
    assert settled(page)["points"] == [pytest.approx([0.5, 0.25, 1], abs=0.01)]
    expect(page.locator("#undo")).to_be_enabled()
    page.locator("#undo").tap()
    expect(page.locator("#undo")).to_be_disabled()


def test_typed_labels_are_scored(clip, opened):
    page = opened(clip)
    expect(page.locator("#bars .row")).to_have_count(len(clip_run.CLASSES))
    expect(page.locator("#bars .row").first.locator(".fill")).to_have_count(2)
    page.locator("#labels").fill("a fox\n\nan owl")
    expect(page.locator("#bars .row")).to_have_count(2)
    percents = [float(text.removesuffix(" %")) for text in page.locator("#bars .value").all_inner_texts()]
    assert percents[0] + percents[2] == pytest.approx(100, abs=0.2) and percents[0] >= percents[2]
    expect(page.locator("#legends p").first).to_contain_text("teacher: a")
    page.locator("#templates").fill("without a place")
    expect(page.get_by_role("alert")).to_contain_text("needs {} once")
    page.locator("#templates").fill("{}")
    expect(page.get_by_role("alert")).to_be_hidden()
