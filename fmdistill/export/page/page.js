// The page of `fmdistill export RUN web`: one picture, the prompts on it, and the mask that the exported networks give.
import { maskLayer, Pointing } from "./pointing.js";

const $ = (id) => document.getElementById(id);
const INSIDE = [0, 114, 178];
const SHOWN = [1024, 2048]; // least and most pixels on the long side of the canvas
const LARGEST = 4096; // pixels on the long side of the picture in memory: phones refuse larger canvases

const state = { model: null, ready: false, picture: null, embedded: false, opening: 0, mask: null };
const pointing = new Pointing({
  changed: () => refresh(), redraw: () => draw(), aspect: () => state.picture ? state.picture.width / state.picture.height : 0,
});

// ---- the worker that runs the networks

const waiting = new Map();
let worker, calls = 0;

function startWorker() {
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onerror = (event) => tell(`The worker of this page does not start: ${event.message || "module workers are needed"}`);
  worker.onmessage = ({ data }) => {
    if (data.stage) return stages[data.stage](data);
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.problem) reject(new Error(data.problem)); else resolve(data.result);
  };
}

const ask = (task, argument, transfer = []) => new Promise((resolve, reject) => {
  waiting.set(++calls, { resolve, reject });
  worker.postMessage({ id: calls, task, argument }, transfer);
});

const stages = {
  runtime: () => wait("Loading ONNX Runtime"),
  model: ({ name, share }) => {
    const { bytes, encoder } = state.model.page, all = Object.values(bytes).reduce((a, b) => a + b, 0);
    const before = name === state.model.decoder ? bytes[state.model.encoder] : 0;
    wait(`Loading the networks, ${(all / 1e6).toFixed(0)} MB`, (before + share * bytes[name]) / all);
  },
  start: () => wait("Starting the networks"),
};

// ---- what the page says

function tell(problem) {
  $("message").hidden = !problem;
  if (problem) $("message").querySelector("p").textContent = problem.message || String(problem);
}

function wait(text, share) { // a bar with `share` of its length, or a moving one without
  $("wait").hidden = !text;
  if (!text) return;
  $("wait").querySelector("p").textContent = text;
  const bar = $("wait").querySelector("progress");
  if (share === undefined) bar.removeAttribute("value"); else bar.value = share;
}

const time = (ms) => ms >= 1000 ? `${(ms / 1000).toFixed(1)} s` : `${ms.toFixed(0)} ms`;

// ---- opening an image: decoded and encoded once

async function open({ name, read }) {
  const turn = ++state.opening, current = () => turn === state.opening;
  let picture;
  try {
    picture = await decoded(await read(), name);
  } catch (error) {
    if (current()) tell(error);
    return;
  }
  if (!current()) return;
  tell(null);
  Object.assign(state, { picture: { ...picture, name }, embedded: false, mask: null });
  pointing.reset();
  document.documentElement.style.setProperty("--aspect", picture.width / picture.height);
  for (const button of $("samples").children) button.setAttribute("aria-pressed", button.dataset.name === name);
  if (scrollY > 0) scrollTo({ top: 0 }); // on a phone the samples are below the picture
  draw();
  encode();
}

async function decoded(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error(`${name}: this browser cannot decode it; save it as JPEG, PNG or WebP and open that.`);
  }
  if (Math.max(bitmap.width, bitmap.height) > LARGEST) {
    const [resizeHeight, resizeWidth] = scaled(bitmap, LARGEST);
    const smaller = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high" });
    bitmap.close();
    bitmap = smaller;
  }
  const { width, height } = bitmap, longest = Math.max(width, height);
  return { bitmap, width, height, shown: scaled(bitmap, Math.min(SHOWN[1], Math.max(SHOWN[0], longest))) };
}

function scaled({ width, height }, longest) { // [height, width] of the picture with this longest side
  return [height, width].map((value) => Math.max(1, Math.round(value * longest / Math.max(width, height))));
}

let encoding = false, last = null; // milliseconds of the encoder's last run
async function encode() {
  if (encoding || !state.ready) return; // the newest picture follows the one under way
  encoding = true;
  while (state.picture && !state.embedded) {
    const { picture } = state, start = performance.now();
    const text = () => `Encoding the picture, ${((performance.now() - start) / 1000).toFixed(0)} s`;
    const show = () => wait(text(), last ? Math.min(0.97, (performance.now() - start) / last) : undefined);
    show();
    const timer = setInterval(show, 100);
    $("status").textContent = "Encoding the picture";
    try {
      const bitmap = await createImageBitmap(picture.bitmap);
      const { milliseconds } = await ask("encode", { bitmap }, [bitmap]);
      last = milliseconds;
      if (state.picture === picture) state.embedded = milliseconds;
    } catch (error) {
      if (state.picture === picture) { tell(`The encoder failed: ${error.message}`); state.picture = null; }
    }
    clearInterval(timer);
  }
  encoding = false;
  wait(null);
  $("status").textContent = state.picture ? "Ready: point at an object" : "";
  refresh();
}

// ---- masks: at most one prompt is under way, and the newest follows it

let decoding = false, wanted = false;
async function refresh() {
  wanted = true;
  draw();
  if (decoding) return;
  decoding = true;
  $("panel").setAttribute("aria-busy", true);
  while (wanted) {
    wanted = false;
    await new Promise(requestAnimationFrame);
    const prompt = pointing.prompt(), { picture } = state;
    if (!picture || !state.embedded || !prompt) {
      state.mask = null;
      draw();
      continue;
    }
    try {
      const [height, width] = picture.shown;
      const answer = await ask("decode", { prompt, size: [height, width] });
      if (state.picture !== picture || !state.embedded) continue;
      const layer = maskLayer(answer.bits, width, height, (i) => answer.bits[i] ? INSIDE : null);
      state.mask = { ...answer, layer, prompt };
      if (!pointing.empty) announce(answer.bits);
      draw();
    } catch (error) {
      tell(`The decoder failed: ${error.message}`);
    }
  }
  decoding = false;
  $("panel").setAttribute("aria-busy", false);
}

function announce(bits) { // for those who do not see the mask
  const share = bits.reduce((sum, bit) => sum + bit, 0) / bits.length;
  $("status").textContent = `The mask covers ${(100 * share).toFixed(share < 0.1 ? 1 : 0)} % of the picture`;
}

let scheduled = false;
function draw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    showTools();
    if (!state.picture) return;
    const { bitmap, name, width, height, shown: [down, right] } = state.picture, canvas = $("picture"), { mask } = state;
    if (canvas.width !== right || canvas.height !== down) Object.assign(canvas, { width: right, height: down });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, right, down);
    context.drawImage(bitmap, 0, 0, right, down);
    if (mask) context.drawImage(mask.layer, 0, 0);
    if (state.embedded) pointing.draw(context, right, down, right / (canvas.clientWidth || right));
    const numbers = mask ? [`encoder ${time(state.embedded)}`, `mask ${time(mask.milliseconds)}`,
      `predicted IoU ${mask.predicted.toFixed(2)}`] : [];
    $("numbers").textContent = numbers.join(" · ");
    $("name").textContent = `${name}, ${width} × ${height}`;
  });
}

async function save() { // at the picture's own size
  const { picture, mask } = state;
  if (!picture || !mask) return;
  const { width, height, name } = picture;
  const { bits } = await ask("decode", { prompt: mask.prompt, size: [height, width] });
  const image = new ImageData(width, height), words = new Uint32Array(image.data.buffer);
  for (let i = 0; i < bits.length; i++) words[i] = bits[i] ? 0xffffffff : 0xff000000;
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  const address = URL.createObjectURL(await canvas.convertToBlob({ type: "image/png" }));
  const link = Object.assign(document.createElement("a"), { href: address, download: `${name.replace(/\.\w+$/, "")}_mask.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// ---- tools, samples, files

function showTools() {
  const press = (element, on) => element.setAttribute("aria-pressed", on);
  for (const button of document.querySelectorAll("[data-mode]")) press(button, button.dataset.mode === pointing.mode);
  for (const button of document.querySelectorAll("[data-label]")) press(button, +button.dataset.label === pointing.label);
  $("panel").classList.toggle("boxing", pointing.mode === "box");
  $("choice").value = pointing.choice;
  $("undo").disabled = $("clear").disabled = pointing.empty;
  $("save").disabled = !state.mask;
}

function listen() {
  pointing.listenTo($("picture"));
  pointing.listenToKeys({ s: save, o: () => $("file").click() });
  for (const button of document.querySelectorAll("[data-mode]")) button.onclick = () => pointing.setMode(button.dataset.mode);
  for (const button of document.querySelectorAll("[data-label]")) button.onclick = () => pointing.setLabel(+button.dataset.label);
  $("choice").onchange = () => pointing.set({ choice: $("choice").value });
  $("undo").onclick = () => pointing.undo();
  $("clear").onclick = () => pointing.clear();
  $("save").onclick = () => save().catch(tell);
  $("open").onclick = () => $("file").click();
  $("message").querySelector("button").onclick = () => tell(null);
  addEventListener("resize", draw);
}

function listenForFiles() {
  const take = (files) => { if (files.length) open({ name: files[0].name || "picture", read: async () => files[0] }); };
  $("file").onchange = () => { take([...$("file").files]); $("file").value = ""; };
  let inside = 0;
  const over = (count) => { inside = Math.max(0, count); $("drop").hidden = !inside; };
  addEventListener("dragenter", (event) => { event.preventDefault(); over(inside + 1); });
  addEventListener("dragleave", () => over(inside - 1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); over(0); take(event.dataTransfer.files); });
  addEventListener("paste", (event) => take(event.clipboardData.files));
}

function showSamples(samples) {
  $("samples").replaceChildren(...samples.map((path) => {
    const button = document.createElement("button"), name = path.split("/").at(-1);
    Object.assign(button, { type: "button", onclick: () => open({ name, read: () => read(path) }) });
    Object.assign(button.dataset, { name });
    button.setAttribute("aria-pressed", false);
    const image = Object.assign(document.createElement("img"), { src: path, alt: name.replace(/\.\w+$/, "") });
    button.append(image);
    return button;
  }));
}

async function read(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server answered ${response.status}.`);
  return response.blob();
}

(async () => {
  listen();
  listenForFiles();
  showTools();
  $("keys").open = matchMedia("(min-width: 62rem) and (min-height: 56rem)").matches; // if it hides nothing
  try {
    const exported = JSON.parse(await (await read("fmdistill.json")).text());
    state.model = exported.model;
    $("about").textContent = exported.source.title;
    document.title = `Segment · ${exported.source.title}`;
    showSamples(state.model.page.samples);
    if (state.model.page.samples.length) $("samples").firstChild.click();
    startWorker();
    await ask("load", state.model);
    state.ready = true;
    wait(null);
    encode();
  } catch (error) {
    wait(null);
    tell(`The networks cannot be loaded: ${error.message}`);
  }
})();
