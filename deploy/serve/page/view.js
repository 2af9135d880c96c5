// What a page shows of an answer: boxes in an SVG over the picture, classes, table, latency, model card; and the ways a
// picture comes in. Shared by the server's page and by the folder that `compress export --for web` writes.
//
// An answer is { width, height, detections }, and a detection { box: [x1, y1, x2, y2] in pixels of the picture, score,
// label, class_name }, highest score first.

const COLOURS = ["#ffd23f", "#4fd1ff", "#ff7ac6", "#7ee36b", "#ff9d4d", "#c3a6ff", "#3fe0c0", "#ff7d7d", "#b7d7ff",
  "#e8e27a"]; // as deploy/core/draw.py
const state = { answer: null, off: new Set(), seen: new Map(), cut: "" };

export const $ = (id) => document.getElementById(id);

export const make = (tag, content = "", attributes = {}) => {
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

export function badge(id, kind, text) {
  $(id).className = `badge ${kind}`;
  $(id).textContent = text;
}

export function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

// ---- the picture and what was found in it

// The place of the picture appears, without boxes; what #image shows is the caller's.
export function showPlace() {
  state.answer = null;
  $("boxes").replaceChildren();
  $("figure").hidden = false;
  $("hint").hidden = true;
  $("picture").classList.remove("empty");
}

export function clear() {
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

// `next`: of the same video, where the choice of classes stays.
export function showAnswer(answer, next = false) {
  state.answer = answer;
  const before = next ? state.seen.size : -1;
  if (!next) {
    state.off.clear();
    state.seen.clear();
  }
  for (const found of answer.detections) state.seen.set(found.label, found.class_name);
  if (state.seen.size !== before) showClasses();
  showBoxes();
}

function chosen() {
  const least = Number($("score").value);
  return state.answer.detections.filter((found) => found.score >= least && !state.off.has(found.label));
}

function showClasses() {
  const count = (label) => state.answer.detections.filter((found) => found.label === label).length;
  const rows = [...state.seen].sort((a, b) => count(b[0]) - count(a[0])).map(([label, name]) => {
    const line = make("label");
    const check = make("input", "", { type: "checkbox", value: label });
    check.checked = !state.off.has(label);
    check.addEventListener("change", () => {
      if (check.checked) state.off.delete(label);
      else state.off.add(label);
      showBoxes();
    });
    const swatch = make("i");
    swatch.style.background = colour(label);
    line.append(check, swatch, make("b", name), make("span", "", { "data-label": label }));
    return line;
  });
  $("class-list").replaceChildren(...(rows.length ? rows : [make("p", "None found.", { class: "soft" })]));
  $("score").disabled = $("classes").disabled = rows.length === 0;
}

export function showBoxes() {
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

// stages: [name, milliseconds, whether it is a sum] each.
export function showLatency(stages, hint) {
  const longest = Math.max(...stages.map(([, ms]) => ms));
  $("stages").replaceChildren(...stages.map(([name, ms, whole]) => {
    const line = make("div", "", { class: whole ? "stage-row whole" : "stage-row" });
    const track = make("div", "", { class: "track" });
    const bar = make("i");
    bar.style.width = `${(100 * ms) / longest}%`;
    track.append(bar);
    line.append(make("span", name), track, make("b", `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`));
    return line;
  }));
  $("latency-hint").textContent = hint;
}

export function showCard(card, backend) {
  const precision = Object.entries(card.precision).map(([part, kind]) => `${part} ${kind}`).join(", ");
  const names = card.class_names;
  const point = card.operating_point;
  const facts = [
    ["model", card.name],
    ["runs on", backend],
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

// The slider goes to where the model's F1 was best, once for a name: a person may have moved it since.
export function startAt(name, card) {
  const slider = $("score");
  const point = card.operating_point;
  const least = point ? Math.floor(point.score * 100 + 1e-9) / 100 : Number(slider.defaultValue);
  if (state.cut === `${name} ${least}`) return;
  state.cut = `${name} ${least}`;
  slider.value = least;
  slider.dispatchEvent(new Event("input"));
}

// ---- ways in

// take(files): called with those chosen, pasted or dropped, one at least.
export function listen(take) {
  const some = (files) => {
    const full = [...files].filter((one) => one.size);
    if (full.length) take(full);
    else problem("There was no file in it.");
  };
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    some($("file").files);
    $("file").value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) some(event.clipboardData.files);
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
    some(event.dataTransfer.files);
  });
  $("score").addEventListener("input", () => {
    $("score-value").textContent = Number($("score").value).toFixed(2);
    showBoxes();
  });
  $("all").addEventListener("click", () => every(true));
  $("none").addEventListener("click", () => every(false));
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
  new ResizeObserver(showBoxes).observe($("figure"));
}

function every(on) {
  for (const check of $("class-list").querySelectorAll("input")) {
    check.checked = on;
    if (on) state.off.delete(Number(check.value));
    else state.off.add(Number(check.value));
  }
  showBoxes();
}

// ---- files

// The pixels of a picture file (an ArrayBuffer) as they are stored: browsers turn some kinds of files and not others, so
// the bytes that say so are made unreadable first, in a copy. Throws where the browser knows no such picture.
export async function storedPixels(bytes, options = {}) {
  const copy = new Uint8Array(bytes.slice(0));
  if (copy[0] === 0x89) return createImageBitmap(new Blob(withoutExif(copy)), options);
  const exif = { 0xff: /Exif\0\0/g, 0x52: /EXIF/g }[copy[0]]; // of JPEG and WebP
  if (exif) {
    for (const { index } of new TextDecoder("latin1").decode(copy).matchAll(exif)) copy.fill(0x78, index, index + 4);
  }
  return createImageBitmap(new Blob([copy]), options);
}

// The bytes of a PNG in pieces, without the chunk that says how it is turned: Firefox reads no PNG with a chunk whose
// name or sum is wrong.
function withoutExif(bytes) {
  const data = new DataView(bytes.buffer);
  const kept = [bytes.subarray(0, 8)];
  let at = 8;
  while (at + 12 <= bytes.length) {
    const end = at + 12 + data.getUint32(at);
    if (new TextDecoder("latin1").decode(bytes.subarray(at + 4, at + 8)) !== "eXIf") kept.push(bytes.subarray(at, end));
    at = end;
  }
  return [...kept, bytes.subarray(at)];
}
