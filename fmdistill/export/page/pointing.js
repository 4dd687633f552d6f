// Points and boxes that a person puts on a picture by mouse, keyboard and touch, and how they and a mask are drawn.
// Used by the page of `fmdistill serve` and by that of `fmdistill export RUN web`. Places are shares of the picture.

const STEP = 0.01, LEAP = 0.05; // the crosshair's steps, as shares of the picture
const DRAG = 6; // pixels that a pointer moves before a click is a drag
const EDGE = [255, 255, 255];

const share = (value) => Math.min(1, Math.max(0, value));
const boxOf = (a, b) => [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];

export class Pointing {
  // `changed` is called when the prompt is another one, `redraw` when only its drawing is, `aspect` returns width /
  // height of the picture, or 0 without one.
  constructor({ changed, redraw, aspect }) {
    Object.assign(this, { changed, redraw, aspect, mode: "point", label: 1, choice: "auto" });
    this.reset();
  }

  reset() {
    Object.assign(this, { history: [], draft: null, corner: null, hover: { x: 0.5, y: 0.5 }, crosshair: false });
  }

  get empty() { return !this.history.length && !this.draft; }

  prompt() { // {points: [[x, y, label]], box: [left, top, right, bottom] or null, mask: choice}, or null
    const kept = this.draft ? [...this.history, this.draft] : this.history;
    const points = kept.filter((item) => item.x !== undefined).map((item) => [item.x, item.y, item.label]);
    const box = kept.filter((item) => item.box).map((item) => item.box).at(-1) || null;
    if (!points.length && !box) {
      if (!this.hover || this.mode === "box" && !this.hover.shown) return null;
      points.push([this.hover.x, this.hover.y, this.label]);
    }
    return { points, box, mask: this.choice };
  }

  keep(item) { this.history.push(item); this.forget(); }
  undo() { if (this.draft) this.forget(); else { this.history.pop(); this.changed(); } }
  clear() { this.history = []; this.forget(); }
  forget() { this.draft = this.corner = null; this.changed(); }
  set(changes) { Object.assign(this, changes); this.changed(); }
  setMode(mode) { this.set({ draft: null, corner: null, mode }); }
  setLabel(label) { this.set({ label, mode: "point" }); }

  listenTo(canvas) {
    this.surface ??= canvas;
    let down = null;
    const place = (event) => {
      const area = canvas.getBoundingClientRect();
      return { x: share((event.clientX - area.left) / area.width), y: share((event.clientY - area.top) / area.height) };
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.aspect() || event.button > 0) return;
      down = { ...place(event), at: [event.clientX, event.clientY], dragged: false };
      if (this.mode === "box" || event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.aspect()) return;
      const at = place(event);
      const far = down && Math.hypot(event.clientX - down.at[0], event.clientY - down.at[1]) > DRAG;
      if (far && (this.mode === "box" || event.pointerType === "mouse")) {
        down.dragged = true;
        return this.set({ draft: { box: boxOf(down, at) }, corner: null });
      }
      this.crosshair = false;
      this.hover = at;
      if (this.empty) this.changed(); else this.redraw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const started = down;
      down = null;
      if (!started) return;
      const excluded = event.shiftKey || event.ctrlKey;
      if (started.dragged) this.keep(this.draft);
      else if (this.mode === "point") this.keep({ ...place(event), label: excluded ? 0 : this.label });
    });
    canvas.addEventListener("pointercancel", () => { down = null; this.forget(); });
    canvas.addEventListener("contextmenu", (event) => {
      event.preventDefault();
      if (this.aspect() && event.pointerType !== "touch" && !event.ctrlKey) this.keep({ ...place(event), label: 0 });
    });
  }

  listenToKeys(actions) { // `actions` are further keys of the page
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest("textarea, input, select");
      if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const action = {
        Enter: event.target.closest("button, summary") ? null : () => this.enter(),
        Backspace: () => this.undo(), Escape: () => this.clear(), n: () => this.setLabel(1 - this.label),
        b: () => this.setMode(this.mode === "box" ? "point" : "box"),
        m: () => this.set({ choice: { auto: "1", 1: "2", 2: "3", 3: "0", 0: "auto" }[this.choice] }),
        ...actions,
      }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!moves && !action) return;
      event.preventDefault();
      if (action) return action();
      if (event.target.closest("button, summary")) this.surface.focus({ preventScroll: true }); // for Enter
      this.move(moves, event.shiftKey ? LEAP : STEP);
    });
  }

  move([right, down], step) {
    const aspect = this.aspect(), { x, y } = this.hover;
    if (!aspect) return;
    this.crosshair = true;
    this.hover = { x: share(x + right * step / Math.max(1, aspect)), y: share(y + down * step * Math.min(1, aspect)),
      shown: true };
    if (this.corner) this.draft = { box: boxOf(this.corner, this.hover) };
    this.changed();
  }

  enter() {
    if (!this.aspect()) return;
    const { x, y } = this.hover;
    this.crosshair = true;
    if (this.mode === "point") return this.keep({ x, y, label: this.label });
    if (!this.draft) return this.set({ corner: { x, y }, draft: { box: [x, y, x, y] } });
    this.keep(this.draft);
  }

  draw(context, width, height, unit) { // `unit`: canvas pixels in a pixel of the page
    const items = [...this.history, ...(this.draft ? [this.draft] : [])], { hover } = this;
    const box = items.filter((item) => item.box).at(-1);
    if (box) {
      const [left, top, right, bottom] = box.box;
      const frame = [left * width, top * height, (right - left) * width, (bottom - top) * height];
      stroke(context, unit, () => context.rect(...frame));
    }
    for (const item of items) if (item.x !== undefined) drawPoint(context, item, width, height, unit);
    if (hover && this.crosshair) {
      stroke(context, unit, () => {
        context.moveTo(hover.x * width, 0); context.lineTo(hover.x * width, height);
        context.moveTo(0, hover.y * height); context.lineTo(width, hover.y * height);
      }, 1);
    }
    if (hover && !items.length && (this.mode === "point" || hover.shown)) {
      drawPoint(context, { ...hover, label: this.label, loose: true }, width, height, unit);
    }
  }
}

function stroke(context, unit, path, line = 2) {
  for (const [colour, wide] of [["rgb(0 0 0 / .55)", line + 2], ["#fff", line]]) {
    context.beginPath();
    path();
    context.lineWidth = wide * unit;
    context.strokeStyle = colour;
    context.stroke();
  }
}

function drawPoint(context, { x, y, label, loose }, width, height, unit) {
  const radius = (loose ? 5 : 7) * unit, [cx, cy] = [x * width, y * height];
  context.beginPath();
  context.arc(cx, cy, radius, 0, 2 * Math.PI);
  context.fillStyle = loose ? "rgb(255 255 255 / .35)" : label ? "#12813f" : "#c22a2a";
  context.fill();
  stroke(context, unit, () => context.arc(cx, cy, radius, 0, 2 * Math.PI), 1.5);
  if (loose) return;
  context.beginPath();
  context.moveTo(cx - 3 * unit, cy); context.lineTo(cx + 3 * unit, cy);
  if (label) { context.moveTo(cx, cy - 3 * unit); context.lineTo(cx, cy + 3 * unit); }
  context.lineWidth = 1.8 * unit;
  context.strokeStyle = "#fff";
  context.stroke();
}

const word = ([r, g, b], alpha) => (alpha << 24 | b << 16 | g << 8 | r) >>> 0; // little-endian, as browsers are

// Return a mask (1 inside, 0 outside, row by row) as a canvas: white contour, and `fill(i)` the colour [r, g, b] of
// pixel i or null; without `fill` the contour alone.
export function maskLayer(bits, width, height, fill) {
  const image = new ImageData(width, height), rgba = new Uint32Array(image.data.buffer), edge = word(EDGE, 240);
  const reach = Math.max(1, Math.round(width / 500)), words = new Map();
  for (let i = 0; fill && i < bits.length; i++) {
    const colour = fill(i);
    if (!colour) continue;
    if (!words.has(colour)) words.set(colour, word(colour, 150));
    rgba[i] = words.get(colour);
  }
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!bits[i]) continue;
      const left = x >= reach && !bits[i - reach], right = x + reach < width && !bits[i + reach];
      const above = y >= reach && !bits[i - reach * width], below = y + reach < height && !bits[i + reach * width];
      if (left || right || above || below) rgba[i] = edge;
    }
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
