// The page at /: one picture to /v1/detect, its boxes over the picture. No library, nothing from elsewhere.

import { $, badge, clear, listen, make, problem, showAnswer, showBoxes, showCard, showLatency, showPlace, startAt,
  storedPixels } from "./view.js";

const state = { models: [], file: null, url: null, running: null, again: 0 };

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
    badge("server", "bad", error.status === 401 ? "token needed" : "no answer");
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
    showStages(answer.timing_ms, performance.now() - start, answer.batch);
    showAnswer(found);
  } catch (error) {
    if (running.signal.aborted) return;
    clear();
    if (error.status === 0) connect(); // says so, and again when the server is back
    else problem(error.message);
  } finally {
    if (state.running === running) $("busy").hidden = true;
  }
}

// The file turned as the server did.
async function upright(file, { width, height, orientation }) {
  const raw = await storedPixels(await file.arrayBuffer());
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
  const image = $("image");
  image.alt = file.name ? `The picture ${file.name}` : "The picture";
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < 480);
    showBoxes();
  };
  image.src = state.url;
  showPlace();
}

function showStages(timing, roundTrip, batch) {
  showLatency([["receive", timing.receive], ["decode", timing.decode], ["queue", timing.queue],
    ["inference", timing.inference], ["server", timing.total, true], ["round trip", roundTrip, true]],
  `Of the last picture, by stage; ${batch} in its batch.`);
}

// ---- the model

function showModel() {
  const model = current();
  document.querySelector("h1").textContent = model ? model.name : "Detect";
  document.title = model ? `${model.name} · compress` : "compress";
  if (!model?.card) {
    badge("server", "idle", "warming up");
    $("card").replaceChildren();
    return;
  }
  badge("server", "good", `ready · ${model.backend}`);
  startAt(model.name, model.card);
  showCard(model.card, model.backend);
}

// ---- ways in

listen(([file]) => detect(file));
$("sample").addEventListener("click", async () => {
  try {
    const response = await fetchOk("/page/sample.jpg");
    detect(new File([await response.blob()], "sample.jpg", { type: "image/jpeg" }));
  } catch (error) {
    problem(`The sample did not come: ${error.message}`);
  }
});
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
$("model").addEventListener("change", () => {
  showModel();
  if (state.file) detect(state.file);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  connect().then(() => state.file && $("token-form").hidden && detect(state.file));
});
connect();
