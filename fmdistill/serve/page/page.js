// The page of `fmdistill serve`: one picture, the prompts on it, and what each network answers.
import { maskLayer, Pointing } from "./pointing.js";

const $ = (id) => document.getElementById(id);
const LIGHT = [[5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
  [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31]]; // ColorBrewer's RdBu, reversed
const AGREED = [0, 114, 178], MISSED = [255, 215, 0], ADDED = [213, 40, 120];
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]; // of the bars, by network

const state = {
  session: null, source: null, image: null, bitmap: null, opening: 0,
  differences: true, showWeights: false,
  embedded: {}, answers: {}, weights: null,
};
const pointing = new Pointing({
  changed: () => { showTools(); masks.refresh(); }, redraw: () => draw(),
  aspect: () => state.image ? state.image.shown[1] / state.image.shown[0] : 0,
});

// ---- requests

class Failure extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Failure("The server does not answer. Is `fmdistill serve` still running?", 0);
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Failure(answer.error || `The server answered ${response.status}.`, response.status);
  return answer;
}

const post = (path, content) => request(path, {
  method: "POST", body: JSON.stringify(content), headers: { "Content-Type": "application/json" },
});

function tell(error) {
  $("message").hidden = !error;
  if (error) $("message").querySelector("p").textContent = error.message || String(error);
}

// ---- opening an image: decoded and embedded once, by one network after the other

async function open(source) {
  const turn = ++state.opening;
  const current = () => turn === state.opening;
  try {
    if (source.file && source.file.size > state.session.upload) {
      throw new Failure(`${source.file.name} is larger than ${state.session.upload / 1e6} MB; make it smaller.`);
    }
    const made = source.file
      ? await request(`api/images?name=${encodeURIComponent(source.file.name || "image")}`, {
        method: "POST", body: source.file, headers: { "Content-Type": "application/octet-stream" } })
      : await request(`api/samples/${source.sample}`, { method: "POST" });
    const picture = await fetch(`api/images/${made.image}/picture`);
    const bitmap = await createImageBitmap(await picture.blob());
    if (!current()) return;
    const same = state.image && state.image.image === made.image;
    Object.assign(state, { source, image: made, bitmap, embedded: {}, answers: {}, weights: null });
    if (!same) pointing.reset();
    tell(null);
    document.documentElement.style.setProperty("--aspect", made.shown[1] / made.shown[0]);
    markSample();
    if (!same && scrollY > 0) scrollTo({ top: 0 }); // on a phone the samples are below the picture
    kind.opened();
  } catch (error) {
    if (current()) tell(error);
    return;
  }
  const students = state.session.subjects.filter((subject) => !subject.teacher);
  const teachers = state.session.subjects.filter((subject) => subject.teacher);
  for (const subject of [...students, ...teachers]) { // a student answers before a large teacher has looked
    if (!current()) return;
    await embed(subject, current);
  }
}

async function embed(subject, current) {
  try {
    const made = await request(`api/images/${state.image.image}/embedding?subject=${encodeURIComponent(subject.name)}`,
      { method: "POST" });
    if (!current()) return;
    state.embedded[subject.name] = { milliseconds: made.milliseconds };
  } catch (error) {
    if (!current()) return;
    state.embedded[subject.name] = { problem: error.message };
    if (error.status !== 400) tell(error);
  }
  if (subject.teacher && state.showWeights) loadWeights();
  kind.refresh();
}

async function again(error) { // the server drops the images that were used least recently
  if (error.status !== 410 || !state.source) return false;
  await open(state.source);
  return true;
}

// ---- masks

const masks = {
  running: false, wanted: false,

  start() {
    $("masks").hidden = $("keys").hidden = false;
    $("keys").open = matchMedia("(min-width: 62rem) and (min-height: 50rem)").matches; // where it hides nothing
    const panels = state.session.subjects.map(makePanel);
    $("panels").replaceChildren(...panels);
    const columns = panels.length === 4 ? 2 : Math.min(panels.length, 3);
    document.documentElement.style.setProperty("--columns", columns);
    const alone = !state.session.subjects.some((subject) => !subject.problem && subject.teacher);
    if (alone && state.session.samples.every((sample) => !sample.group.startsWith("validation"))) {
      state.differences = false;
      $("differences").hidden = true;
    }
    listen();
    showTools();
  },

  opened() { draw(); showTools(); },

  async refresh() {
    this.wanted = true;
    draw();
    if (this.running) return; // answered with the newest prompt once the answer under way has come
    this.running = true;
    $("panels").setAttribute("aria-busy", true);
    while (this.wanted) {
      this.wanted = false;
      const prompt = pointing.prompt(), image = state.image;
      if (!image || !prompt) {
        state.answers = {};
        $("answer").textContent = "";
        draw();
        continue;
      }
      const start = performance.now();
      try {
        const answer = await post(`api/images/${image.image}/masks`, prompt);
        if (state.image !== image) continue;
        const milliseconds = performance.now() - start;
        state.answers = Object.fromEntries(answer.masks.map((each) => [each.subject, painted(each, answer.size)]));
        if (answer.masks.length) $("answer").textContent = `answered in ${milliseconds.toFixed(0)} ms`;
        draw();
      } catch (error) {
        if (await again(error)) continue;
        tell(error);
      }
    }
    this.running = false;
    $("panels").setAttribute("aria-busy", false);
  },
};

function painted(answer, [height, width]) {
  const bits = new Uint8Array(height * width);
  let at = 0, inside = 0;
  for (const length of answer.runs) {
    if (inside) bits.fill(1, at, at + length);
    at += length;
    inside ^= 1;
  }
  return { ...answer, bits, height, width, layers: {} };
}

function layer(answer, teacher, kind) { // the mask as a canvas, made once for each view
  const { bits, height, width, layers } = answer, other = kind === "differences" ? teacher.bits : bits;
  const fill = (i) => bits[i] ? (other[i] ? AGREED : ADDED) : other[i] ? MISSED : null;
  return layers[kind] ??= maskLayer(bits, width, height, kind === "outline" ? null : fill);
}

// ---- the panels

function makePanel(subject) {
  const panel = document.createElement("figure");
  panel.className = "panel";
  panel.dataset.subject = subject.name;
  panel.innerHTML = '<figcaption><b></b><span class="title"></span><span class="iou"></span></figcaption>'
    + '<div class="stage"><canvas tabindex="0"></canvas><p class="wait" hidden></p></div><p class="numbers"></p>';
  panel.querySelector("b").textContent = subject.name;
  panel.querySelector(".title").textContent = about(subject);
  panel.querySelector(".title").title = about(subject);
  panel.querySelector("canvas").setAttribute("aria-label",
    `The picture with the mask of ${subject.name}. Arrow keys move the crosshair, Enter keeps a point.`);
  return panel;
}

function about(subject) {
  const size = subject.parameters;
  const count = size ? `${size < 1e7 ? (size / 1e6).toFixed(2) : (size / 1e6).toFixed(0)} M parameters` : "";
  return (subject.teacher ? [subject.title, count] : [count, subject.title]).filter(Boolean).join(" · ");
}

let scheduled = false;
function draw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    if (!state.image) return;
    for (const panel of document.querySelectorAll(".panel")) drawPanel(panel);
    showTools();
  });
}

function drawPanel(panel) {
  const name = panel.dataset.subject, canvas = panel.querySelector("canvas"), [height, width] = state.image.shown;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), answer = state.answers[name], teacher = teacherAnswer();
  const heat = state.showWeights && state.weights;
  context.filter = heat ? "grayscale(1)" : "none";
  context.drawImage(state.bitmap, 0, 0, width, height);
  context.filter = "none";
  if (heat) drawWeights(context, width, height);
  if (answer) {
    const differs = state.differences && teacher && answer !== teacher;
    context.drawImage(layer(answer, teacher, heat ? "outline" : differs ? "differences" : "plain"), 0, 0);
  }
  pointing.draw(context, width, height, width / (canvas.clientWidth || width));
  const embedded = state.embedded[name], numbers = [];
  if (embedded && !embedded.problem) {
    numbers.push(embedded.milliseconds === null ? "embedding from the cache" : `embedding ${time(embedded.milliseconds)}`);
  }
  if (answer) numbers.push(`mask ${time(answer.milliseconds)}`, `predicted IoU ${answer.predicted.toFixed(2)}`);
  panel.querySelector(".numbers").textContent = numbers.join(" · ");
  const shown = answer && answer.iou !== null && answer !== teacher;
  panel.querySelector(".iou").innerHTML = shown ? "<small>IoU</small>" : "";
  if (shown) panel.querySelector(".iou").append(answer.iou.toFixed(2));
  const wait = panel.querySelector(".wait"), problem = embedded && embedded.problem;
  wait.hidden = embedded && !problem;
  wait.classList.toggle("long", Boolean(problem));
  wait.textContent = problem || "embedding the image";
}

const teacherAnswer = () => Object.values(state.answers).find((each) => isTeacher(each.subject));
const isTeacher = (name) => state.session.subjects.some((subject) => subject.teacher && subject.name === name);
const time = (ms) => ms >= 1000 ? `${(ms / 1000).toFixed(1)} s` : ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;

// ---- SRW's weights

async function loadWeights() {
  const image = state.image;
  try {
    const weights = await request(`api/images/${image.image}/weights`);
    if (state.image !== image) return;
    state.weights = weights;
    tell(null);
  } catch (error) {
    state.showWeights = false;
    if (!(await again(error))) tell(error);
  }
  draw();
}

function colour(weight, span) { // white at 1, blue below, red above
  const place = Math.min(1, Math.max(0, 0.5 + (weight - 1) / (2 * span))) * (LIGHT.length - 1);
  const low = Math.min(LIGHT.length - 2, Math.floor(place)), share = place - low;
  return LIGHT[low].map((value, i) => Math.round(value + share * (LIGHT[low + 1][i] - value)));
}

const span = ({ low, high }) => Math.max(1e-6, 1 - low, high - 1);

function drawWeights(context, width, height) {
  const { weights, patch: [right, down] } = state.weights;
  context.globalAlpha = 0.65;
  weights.forEach((row, y) => row.forEach((weight, x) => {
    context.fillStyle = `rgb(${colour(weight, span(state.weights)).join(" ")})`;
    const [left, top] = [Math.round(x * right * width), Math.round(y * down * height)];
    context.fillRect(left, top, Math.round((x + 1) * right * width) - left, Math.round((y + 1) * down * height) - top);
  }));
  context.globalAlpha = 1;
}

function showScale() {
  const { weights } = state, shown = state.showWeights && weights;
  $("scale").hidden = !shown;
  if (!shown) return;
  const canvas = $("scale").querySelector("canvas"), context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const weight = weights.low + (weights.high - weights.low) * x / (canvas.width - 1);
    context.fillStyle = `rgb(${colour(weight, span(weights)).join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
  $("low").textContent = weights.low.toFixed(2);
  $("high").textContent = weights.high.toFixed(2);
  $("weighting").textContent = `SRW's weight of a patch in the loss, mean 1; ${weights.about}`;
}

// ---- tools

function showTools() {
  const press = (element, on) => element.setAttribute("aria-pressed", on);
  for (const button of document.querySelectorAll("[data-mode]")) press(button, button.dataset.mode === pointing.mode);
  for (const button of document.querySelectorAll("[data-label]")) press(button, +button.dataset.label === pointing.label);
  press($("differences"), state.differences);
  press($("weights"), state.showWeights);
  $("masks").classList.toggle("boxing", pointing.mode === "box");
  $("choice").value = pointing.choice;
  $("undo").disabled = $("clear").disabled = pointing.empty;
  $("colours").hidden = !state.differences || Boolean(state.showWeights && state.weights);
  showScale();
}

function set(changes) {
  Object.assign(state, changes);
  showTools();
  masks.refresh();
}

function toggleWeights() {
  set({ showWeights: !state.showWeights });
  if (state.showWeights && !state.weights && state.image) loadWeights();
}

function listen() {
  const switchDifferences = () => set({ differences: !state.differences });
  for (const canvas of document.querySelectorAll(".stage canvas")) pointing.listenTo(canvas);
  for (const button of document.querySelectorAll("[data-mode]")) button.onclick = () => pointing.setMode(button.dataset.mode);
  for (const button of document.querySelectorAll("[data-label]")) button.onclick = () => pointing.setLabel(+button.dataset.label);
  $("choice").onchange = () => pointing.set({ choice: $("choice").value });
  $("undo").onclick = () => pointing.undo();
  $("clear").onclick = () => pointing.clear();
  $("differences").onclick = switchDifferences;
  $("weights").onclick = toggleWeights;
  pointing.listenToKeys({ d: switchDifferences, w: toggleWeights, o: () => $("file").click() });
}

// ---- scores of labels

const scores = {
  running: false, wanted: false,

  start() {
    $("scores").hidden = false;
    $("shown").append($("samples"));
    const labels = state.session.samples.map((sample) => sample.label).filter(Boolean);
    $("labels").value = ([...new Set(labels)].slice(0, 8).join("\n")
      || "a cat\na cup of coffee\na flower\ncoins\na dog\na street");
    $("templates").value = state.session.templates.join("\n");
    let timer;
    for (const id of ["labels", "templates"]) {
      $(id).oninput = () => { clearTimeout(timer); timer = setTimeout(() => this.refresh(), 250); };
    }
  },

  opened() {
    const canvas = $("picture"), [height, width] = state.image.shown;
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").drawImage(state.bitmap, 0, 0, width, height);
    const sample = state.session.samples[state.source.sample];
    $("caption").textContent = sample && sample.label ? `${state.image.name}: ${sample.label}` : state.image.name;
    canvas.setAttribute("aria-label", $("caption").textContent);
    this.show(null);
  },

  async refresh() {
    this.wanted = true;
    if (this.running) return;
    this.running = true;
    while (this.wanted) {
      this.wanted = false;
      const image = state.image, lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
      if (!image || !lines("labels").length) { this.show(null); continue; }
      try {
        const answer = await post(`api/images/${image.image}/scores`,
          { labels: lines("labels"), templates: lines("templates") });
        if (state.image === image) this.show(answer);
        tell(null);
      } catch (error) {
        if (await again(error)) continue;
        tell(error);
      }
    }
    this.running = false;
  },

  show(answer) {
    const rows = answer ? answer.scores : [];
    const bySubject = Object.fromEntries(rows.map((row) => [row.subject, row]));
    $("legends").replaceChildren(...state.session.subjects.map((subject, i) =>
      this.legend(subject, COLOURS[i % COLOURS.length], bySubject[subject.name], answer)));
    if (!rows.length) return $("bars").replaceChildren();
    const first = (rows.find((row) => isTeacher(row.subject)) || rows[0]).probability;
    const order = answer.labels.map((_, i) => i).sort((a, b) => first[b] - first[a]);
    $("bars").replaceChildren(...order.map((i) => this.row(answer.labels[i], i, bySubject, i === order[0])));
  },

  legend(subject, colour, row, answer) {
    const line = document.createElement("p");
    line.innerHTML = '<i></i><b></b><span class="title"></span>';
    line.querySelector("i").style.background = colour;
    const best = row ? row.probability.indexOf(Math.max(...row.probability)) : -1;
    line.querySelector("b").textContent = best < 0 ? subject.name : `${subject.name}: ${answer.labels[best]}`;
    const embedded = state.embedded[subject.name] || {};
    const spent = embedded.problem || (embedded.milliseconds === undefined ? "embedding the image"
      : embedded.milliseconds === null ? "embedding from the cache" : `embedding ${time(embedded.milliseconds)}`);
    line.querySelector(".title").textContent = `${about(subject)} · ${spent}`;
    line.querySelector(".title").title = line.querySelector(".title").textContent;
    return line;
  },

  row(label, i, bySubject, best) {
    const row = document.createElement("div");
    row.className = best ? "row best" : "row";
    row.innerHTML = '<div class="label"></div><div class="pair"></div>';
    row.firstChild.textContent = label;
    state.session.subjects.forEach((subject, number) => {
      const scored = bySubject[subject.name];
      if (!scored) return;
      const bar = document.createElement("div");
      bar.className = "bar";
      bar.innerHTML = '<div class="track"><div class="fill"></div></div><span class="value"></span><span class="cosine"></span>';
      const fill = bar.querySelector(".fill"), share = 100 * scored.probability[i];
      fill.style.width = `${share}%`;
      fill.style.background = COLOURS[number % COLOURS.length];
      bar.querySelector(".value").textContent = `${share.toFixed(1)} %`;
      bar.querySelector(".cosine").textContent = scored.cosine[i].toFixed(3);
      bar.title = `${subject.name}: probability among these labels, and cosine`;
      row.lastChild.append(bar);
    });
    return row;
  },
};

// ---- samples, files, start

function showSamples() {
  let group = null;
  const parts = [];
  state.session.samples.forEach((sample, number) => {
    if (group !== null && group !== sample.group) parts.push(Object.assign(document.createElement("span"), { className: "rule" }));
    group = sample.group;
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.title = `${sample.name} (${sample.group})`;
    button.dataset.sample = number;
    button.onclick = () => open({ sample: number });
    Object.assign(image, { src: `api/samples/${number}`, alt: button.title, loading: "lazy" });
    button.append(image);
    parts.push(button);
  });
  $("samples").replaceChildren(...parts);
}

function markSample() {
  for (const button of $("samples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", +button.dataset.sample === state.source.sample);
  }
}

function listenForFiles() {
  $("open").onclick = () => $("file").click();
  $("file").onchange = () => { if ($("file").files.length) open({ file: $("file").files[0] }); $("file").value = ""; };
  $("message").querySelector("button").onclick = () => tell(null);
  let inside = 0;
  const over = (on) => { inside = on ? inside + 1 : Math.max(0, inside - 1); $("drop").hidden = !inside; };
  addEventListener("dragenter", (event) => { event.preventDefault(); over(true); });
  addEventListener("dragleave", () => over(false));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    $("drop").hidden = true;
    if (event.dataTransfer.files.length) open({ file: event.dataTransfer.files[0] });
  });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) open({ file: event.clipboardData.files[0] }); });
  addEventListener("resize", () => { if (kind === masks) draw(); });
}

let kind = masks;
(async () => {
  try {
    state.session = await request("api/session");
  } catch (error) {
    return tell(error);
  }
  kind = state.session.kind === "masks" ? masks : scores;
  const students = state.session.subjects.filter((subject) => !subject.teacher).map((subject) => subject.name);
  const teacher = state.session.subjects.find((subject) => subject.teacher);
  $("about").textContent = `${students.join(", ")} beside ${teacher.title}`;
  document.title = `${students.join(", ")} · fmdistill`;
  listenForFiles();
  showSamples();
  kind.start();
  if (state.session.samples.length) open({ sample: 0 });
})();
