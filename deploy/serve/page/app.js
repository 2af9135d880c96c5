// The page at /: one picture to /v1/detect, its boxes in an SVG over the picture. No library, nothing from elsewhere.

const COLOURS = ["#ffd23f", "#4fd1ff", "#ff7ac6", "#7ee36b", "#ff9d4d", "#c3a6ff", "#3fe0c0", "#ff7d7d", "#b7d7ff",
  "#e8e27a"]; // as deploy/serve/answers.py
const $ = (id) => document.getElementById(id);
const state = { models: [], file: null, answer: null, off: new Set(), url: null, running: null, again: 0,
  cut: "" };

const make = (tag, content = "", attributes = {}) => {
  const element = document.createElement(tag);
  element.textContent = content;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const draw = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const colour = (label) => COLOURS[label % COLOURS.length];

// ---- the server

// Raises Error with a line for the user; its `status` is 0 when there was no answer at all.
async function fetchOk(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const failed = (message, status) => Object.assign(new Error(message), { status });
  const response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } }).catch((error) => {
    throw error.name === "AbortError" ? error : failed("The server cannot be reached.", 0);
  });
  if (response.ok) return response;
  if (response.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  const answer = await response.json().catch(() => ({}));
  throw failed(answer.error || `the server answered ${response.status}`, response.status);
}

const ask = async (path, options) => (await fetchOk(path, options)).json();

async function connect() {
  clearTimeout(state.again);
  try {
    state.models = await ask("/v1/models");
    if (!$("token-form").hidden || $("server").classList.contains("bad")) problem(""); // of an earlier attempt
    $("token-form").hidden = true;
  } catch (error) {
    badge("bad", error.status === 401 ? "token needed" : "no answer");
    problem(error.message);
    if (error.status !== 401) state.again = setTimeout(connect, 2000); // a 401 waits for the token
    return;
  }
  const select = $("model");
  const before = select.value;
  select.replaceChildren(...state.models.map((model) => make("option", model.name, { value: model.name })));
  if (state.models.some((model) => model.name === before)) select.value = before;
  $("model-row").hidden = state.models.length < 2;
  showModel();
  if (state.models.some((model) => !model.ready)) state.again = setTimeout(connect, 500);
}

function current() {
  return state.models.find((model) => model.name === $("model").value) || state.models[0];
}

function badge(kind, text) {
  $("server").className = `badge ${kind}`;
  $("server").textContent = text;
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

// ---- a picture

async function detect(file) {
  state.file = file;
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  problem("");
  show(file);
  $("busy").hidden = false;
  const start = performance.now();
  try {
    const path = `/v1/detect?model=${encodeURIComponent(current()?.name ?? "")}`;
    const answer = await ask(path, { method: "POST", body: file, signal: running.signal,
      headers: { "Content-Type": "application/octet-stream" } });
    const [found] = answer.images;
    const turned = found.orientation > 1 ? await upright(file, found) : null;
    if (running.signal.aborted) return;
    if (turned) show(file, turned);
    state.answer = found;
    state.off.clear();
    showLatency(answer.timing_ms, performance.now() - start, answer.batch);
    showClasses();
    showBoxes();
  } catch (error) {
    if (running.signal.aborted) return;
    clear();
    if (error.status === 0) connect(); // says so, and again when the server is back
    else problem(error.message);
  } finally {
    if (state.running === running) $("busy").hidden = true;
  }
}

// Browsers turn some kinds of files and not others: here the file is turned as the server did.
async function upright(file, { width, height, orientation }) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const exif = { 0xff: /Exif\0\0/g, 0x89: /eXIf/g, 0x52: /EXIF/g }[bytes[0]]; // of JPEG, PNG and WebP
  if (exif) {
    for (const { index } of new TextDecoder("latin1").decode(bytes).matchAll(exif)) bytes.fill(0x78, index, index + 4);
  }
  const raw = await createImageBitmap(new Blob([bytes])); // nothing says that it is turned
  const canvas = make("canvas", "", { width, height });
  const context = canvas.getContext("2d");
  const [w, h] = [width, height];
  const turns = { 2: [-1, 0, 0, 1, w, 0], 3: [-1, 0, 0, -1, w, h], 4: [1, 0, 0, -1, 0, h], 5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, w, 0], 7: [0, -1, -1, 0, w, h], 8: [0, -1, 1, 0, 0, h] };
  context.setTransform(...turns[orientation]);
  context.drawImage(raw, 0, 0);
  return new Promise((done) => { canvas.toBlob(done); });
}

function show(file, pixels = file) {
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(pixels);
  state.answer = null;
  $("boxes").replaceChildren();
  const image = $("image");
  image.alt = file.name ? `The picture ${file.name}` : "The picture";
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < 480);
    showBoxes();
  };
  image.src = state.url;
  $("figure").hidden = false;
  $("hint").hidden = true;
  $("picture").classList.remove("empty");
}

function clear() {
  state.answer = null;
  $("figure").hidden = true;
  $("hint").hidden = false;
  $("picture").classList.add("empty");
  $("score").disabled = $("classes").disabled = true;
  $("boxes").replaceChildren();
  $("stages").replaceChildren();
  $("latency-hint").textContent = "Of the last picture, by stage.";
  $("summary").textContent = "";
  $("class-list").replaceChildren(make("p", "Those found in the picture appear here.", { class: "soft" }));
  $("rows").replaceChildren(row("No picture yet."));
}

// ---- what was found

function chosen() {
  const least = Number($("score").value);
  return state.answer.detections.filter((found) => found.score >= least && !state.off.has(found.label));
}

function showClasses() {
  const counts = new Map();
  for (const found of state.answer.detections) {
    const before = counts.get(found.label) || { name: found.class_name, count: 0 };
    counts.set(found.label, { ...before, count: before.count + 1 });
  }
  const rows = [...counts].sort((a, b) => b[1].count - a[1].count).map(([label, { name, count }]) => {
    const line = make("label");
    const check = make("input", "", { type: "checkbox", value: label });
    check.checked = true;
    check.addEventListener("change", () => {
      if (check.checked) state.off.delete(label);
      else state.off.add(label);
      showBoxes();
    });
    const swatch = make("i");
    swatch.style.background = colour(label);
    line.append(check, swatch, make("b", name), make("span", count, { "data-label": label }));
    return line;
  });
  $("class-list").replaceChildren(...(rows.length ? rows : [make("p", "None found.", { class: "soft" })]));
  $("score").disabled = $("classes").disabled = rows.length === 0;
}

function showBoxes() {
  if (!state.answer) return;
  const { width, height } = state.answer;
  const found = chosen();
  const pixel = width / ($("image").clientWidth || width); // picture pixels in one of the screen
  const svg = $("boxes");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const marks = [...found].reverse().map((one) => {
    const [x1, y1, x2, y2] = one.box;
    const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    const group = draw("g", { "data-index": state.answer.detections.indexOf(one) });
    const text = draw("text", { "font-size": 13 * pixel });
    text.textContent = `${one.class_name} ${one.score.toFixed(2)}`;
    group.append(draw("rect", { ...place, class: "halo" }),
      draw("rect", { ...place, class: "box", stroke: colour(one.label) }),
      draw("rect", { class: "tag", fill: colour(one.label) }), text);
    return group;
  });
  svg.replaceChildren(...marks);
  for (const group of marks) placeTag(group, pixel, width);
  $("rows").replaceChildren(...(found.length ? found.map(foundRow) : [row("Nothing at this score and choice.")]));
  for (const count of $("class-list").querySelectorAll("[data-label]")) {
    const label = Number(count.dataset.label);
    const least = Number($("score").value);
    const of = state.answer.detections.filter((one) => one.label === label);
    count.textContent = `${of.filter((one) => one.score >= least).length} of ${of.length}`;
  }
  const all = state.answer.detections.length;
  $("summary").textContent = `${found.length} of ${all} ${all === 1 ? "detection" : "detections"} shown · ` +
    `${width} × ${height} px`;
}

// The name above its box, inside where there is no room; only a text in the document has a length.
function placeTag(group, pixel, width) {
  const box = group.querySelector(".box");
  const text = group.querySelector("text");
  const tag = group.querySelector(".tag");
  const high = 18 * pixel;
  const wide = text.getComputedTextLength() + 8 * pixel;
  const left = Math.max(0, Math.min(Number(box.getAttribute("x")), width - wide));
  const y1 = Number(box.getAttribute("y"));
  const top = y1 >= high ? y1 - high : y1;
  for (const [key, value] of Object.entries({ x: left, y: top, width: wide, height: high })) tag.setAttribute(key, value);
  text.setAttribute("x", left + 4 * pixel);
  text.setAttribute("y", top + 13.5 * pixel);
}

function foundRow(found) {
  const line = make("tr", "", { "data-index": state.answer.detections.indexOf(found) });
  line.append(make("td", found.class_name, { class: "left" }), make("td", found.score.toFixed(3)),
    make("td", found.box.map((side) => side.toFixed(0)).join(" ")));
  line.addEventListener("pointerenter", () => mark(line));
  line.addEventListener("pointerleave", () => mark(null));
  return line;
}

// One row of the table and its box stand out, or none.
function mark(line) {
  for (const before of document.querySelectorAll("#rows .on, #boxes .on")) before.classList.remove("on");
  if (!line) return;
  line.classList.add("on");
  const group = $("boxes").querySelector(`[data-index="${line.dataset.index}"]`);
  group.querySelector(".box").classList.add("on");
  $("boxes").append(group); // above the others
}

function row(text) {
  const line = make("tr");
  line.append(make("td", text, { class: "left soft", colspan: 3 }));
  return line;
}

// ---- latency and card

function showLatency(timing, roundTrip, batch) {
  const rows = [["receive", timing.receive], ["decode", timing.decode], ["queue", timing.queue],
    ["inference", timing.inference], ["server", timing.total], ["round trip", roundTrip]];
  const longest = Math.max(...rows.map(([, ms]) => ms));
  $("stages").replaceChildren(...rows.map(([name, ms], index) => {
    const line = make("div", "", { class: index > 3 ? "stage-row whole" : "stage-row" });
    const track = make("div", "", { class: "track" });
    const bar = make("i");
    bar.style.width = `${(100 * ms) / longest}%`;
    track.append(bar);
    line.append(make("span", name), track, make("b", `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`));
    return line;
  }));
  $("latency-hint").textContent = `Of the last picture, by stage; ${batch} in its batch.`;
}

function showModel() {
  const model = current();
  const card = model?.card;
  document.querySelector("h1").textContent = model ? model.name : "Detect";
  document.title = model ? `${model.name} · compress` : "compress";
  if (!card) {
    badge("idle", "warming up");
    $("card").replaceChildren();
    return;
  }
  badge("good", `ready · ${model.backend}`);
  startAt(model);
  const precision = Object.entries(card.precision).map(([part, kind]) => `${part} ${kind}`).join(", ");
  const names = card.class_names;
  const point = card.operating_point;
  const facts = [
    ["model", card.name],
    ["runs on", model.backend],
    ["input", `${card.input_size[1]} × ${card.input_size[0]} px`],
    ["classes", `${names.length}: ${names.slice(0, 24).join(", ")}${names.length > 24 ? " …" : ""}`],
    ["validation", card.val_map === null ? "not measured" : `${card.val_map.toFixed(1)} mAP`],
    ["operating point", point ? `score ${point.score}: F1 ${point.f1.toFixed(2)}, precision ` +
      `${point.precision.toFixed(2)}, recall ${point.recall.toFixed(2)}` : "not measured"],
    ["thresholds", `score ${card.score_threshold}, suppression IoU ${card.nms_threshold}, ` +
      `at most ${card.max_detections}`],
    ["precision", precision || "not stated"],
    ["created", card.created || "not stated"],
    ["checkpoint", card.checkpoint_sha256 ? `sha256 ${card.checkpoint_sha256.slice(0, 16)}…` : "not stated"],
  ];
  $("card").replaceChildren(...facts.flatMap(([key, value]) => [make("dt", key), make("dd", value)]));
}

// The slider goes to where the model's F1 was best, once: a person may have moved it since.
function startAt({ name, card }) {
  const slider = $("score");
  const point = card.operating_point;
  const least = point ? Math.floor(point.score * 100 + 1e-9) / 100 : Number(slider.defaultValue);
  if (state.cut === `${name} ${least}`) return;
  state.cut = `${name} ${least}`;
  slider.value = least;
  slider.dispatchEvent(new Event("input"));
}

// ---- ways in

const take = (files) => {
  const file = [...files].find((one) => one.size);
  if (file) detect(file);
  else problem("There was no file in it.");
};
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files);
  $("file").value = ""; // the same file may be chosen again
});
$("sample").addEventListener("click", async () => {
  try {
    const response = await fetchOk("/page/sample.jpg");
    detect(new File([await response.blob()], "sample.jpg", { type: "image/jpeg" }));
  } catch (error) {
    problem(`The sample did not come: ${error.message}`);
  }
});
$("found").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const lines = [...$("rows").querySelectorAll("[data-index]")];
  if (!step || !lines.length) return;
  event.preventDefault();
  const before = lines.findIndex((line) => line.classList.contains("on"));
  const line = lines[before < 0 ? (step > 0 ? 0 : lines.length - 1) : (before + step + lines.length) % lines.length];
  mark(line);
  line.scrollIntoView({ block: "nearest" });
});
$("found").addEventListener("blur", () => mark(null));
for (const link of document.querySelectorAll("[data-guarded]")) {
  link.addEventListener("click", async (event) => {
    if (!sessionStorage.getItem("token")) return;
    event.preventDefault(); // a link sends no token
    try {
      const text = await (await fetchOk(link.getAttribute("href"))).text();
      location.assign(URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" })));
    } catch (error) {
      problem(error.message);
    }
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("picture").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("picture").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("picture").classList.remove("over");
  take(event.dataTransfer.files);
});
$("score").addEventListener("input", () => {
  $("score-value").textContent = Number($("score").value).toFixed(2);
  showBoxes();
});
const every = (on) => {
  for (const check of $("class-list").querySelectorAll("input")) {
    check.checked = on;
    if (on) state.off.delete(Number(check.value));
    else state.off.add(Number(check.value));
  }
  showBoxes();
};
$("all").addEventListener("click", () => every(true));
$("none").addEventListener("click", () => every(false));
$("model").addEventListener("change", () => {
  showModel();
  if (state.file) detect(state.file);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  connect().then(() => state.file && $("token-form").hidden && detect(state.file));
});
new ResizeObserver(showBoxes).observe($("figure"));
connect();
