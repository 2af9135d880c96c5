// The page that `compress export --for web` writes: pictures, videos and the camera, all of it in this browser. It asks
// only its own folder for files, and no picture leaves it.

import { decode, readPixels } from "./decode.js";
import { backends, openDetector } from "./detector.js";
import { $, badge, clear, listen, make, problem, showAnswer, showCard, showLatency, showPlace, startAt
} from "./view.js";

const SHOWN = 2048; // pixels; a larger picture is shown smaller
// turn: number of what is shown, so that late answers about something else are dropped; opening: likewise of detectors.
const state = { about: null, detector: null, files: [], at: 0, turn: 0, opening: 0, url: null,
  busy: Promise.resolve() };

// ---- the model

async function start() {
  badge("server", "idle", "loading");
  try {
    state.about = await (await fetch("./model.json")).json();
    const { card } = state.about;
    document.querySelector("h1").textContent = card.name;
    document.title = `${card.name} · compress`;
    startAt(card.name, card);
    const asked = new URLSearchParams(location.search).get("backend");
    const names = await backends(asked === "webgpu");
    $("model").replaceChildren(...names.map((name) => make("option", name === "webgpu" ? "WebGPU" : "WebAssembly",
      { value: name })));
    if (asked && !names.includes(asked)) problem(`?backend=${asked}: this browser has ${names.join(" and ")}`);
    else $("model").value = asked || names[0];
    $("model-row").hidden = names.length < 2;
    $("threads").hidden = self.crossOriginIsolated;
    await open();
  } catch (error) {
    badge("server", "bad", "not ready");
    problem(error.message);
  }
}

async function open() {
  const backend = $("model").value;
  const opening = ++state.opening;
  const old = state.detector;
  state.turn++;
  state.detector = null;
  await state.busy;
  old?.close();
  try {
    const detector = await openDetector(state.about, backend, (text) => badge("server", "idle", text));
    if (opening !== state.opening) {
      detector.close();
      return;
    }
    state.detector = detector;
  } catch (error) {
    badge("server", "bad", "not ready");
    problem(`${$("model").selectedOptions[0].textContent} cannot run this model: ${error.message || error}` +
      (backend === "webgpu" ? "; choose WebAssembly" : ""));
    return;
  }
  badge("server", "good", `ready · ${state.detector.backend}`);
  showCard(state.about.card, state.detector.backend);
  if (!$("player").hidden) follow();
  else if (state.files.length) showFile(state.at);
}

// One after the other: the runtime has one memory. Gives what a detector's `detect` gives; null while there is none.
function detect(pixels) {
  const running = state.busy.then(() => state.detector?.detect(pixels) ?? null);
  state.busy = running.catch(() => {});
  return running;
}

// ---- pictures

function take(files) {
  stop();
  const video = files.find((file) => file.type.startsWith("video/"));
  if (video) {
    play(video);
    return;
  }
  state.files = files;
  showFile(0);
}

async function showFile(at) {
  const turn = ++state.turn;
  const file = state.files[at];
  state.at = at;
  problem("");
  $("pager").hidden = state.files.length < 2;
  $("place").textContent = `${at + 1} of ${state.files.length}`;
  $("before").disabled = at === 0;
  $("after").disabled = at === state.files.length - 1;
  $("busy").hidden = false;
  try {
    const begin = performance.now();
    const pixels = await decode(file);
    const decoded = performance.now();
    if (turn !== state.turn) return;
    await showPixels(pixels);
    $("image").setAttribute("aria-label", file.name ? `The picture ${file.name}` : "The picture");
    const found = await detect(pixels);
    if (turn !== state.turn || !found) return;
    const total = decoded - begin + found.ms.canvas + found.ms.inference;
    showLatency([["decode", decoded - begin], ["canvas", found.ms.canvas], ["inference", found.ms.inference],
      ["whole", total, true]], "Of the last picture, by stage.");
    showAnswer(found.answer);
  } catch (error) {
    if (turn !== state.turn) return;
    clear();
    problem(error.message || String(error));
  } finally {
    if (turn === state.turn) $("busy").hidden = true;
  }
}

async function showPixels({ width, height, data }) {
  const canvas = $("image");
  const scale = Math.min(1, SHOWN / Math.max(width, height));
  const image = new ImageData(data, width, height);
  const [wide, high] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const small = scale < 1 ? await createImageBitmap(image, { resizeWidth: wide, resizeHeight: high }) : null;
  [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d");
  if (small) context.drawImage(small, 0, 0);
  else context.putImageData(image, 0, 0);
  canvas.classList.toggle("small", width < 480);
  showPlace();
}

// ---- video and camera

async function play(source) {
  stop();
  problem("");
  const video = $("video");
  state.files = [];
  $("pager").hidden = true;
  const camera = source instanceof MediaStream;
  if (camera) {
    video.srcObject = source;
  } else {
    state.url = URL.createObjectURL(source);
    video.src = state.url;
  }
  try {
    await video.play();
  } catch (error) {
    stop();
    if (error.name !== "AbortError") problem(`${source.name || "The camera"}: cannot be played by this browser`);
    return;
  }
  $("player").hidden = false;
  $("seek-row").hidden = camera;
  $("image").setAttribute("aria-label", camera ? "The camera" : `The video ${source.name}`);
  $("summary").setAttribute("aria-live", "off"); // it changes many times a second
  follow();
}

// Detect frame after frame, always the newest, and again when a pause shows another one.
async function follow() {
  const turn = ++state.turn;
  const video = $("video");
  let [seen, last, next] = [-1, performance.now(), false];
  while (turn === state.turn) {
    await new Promise(requestAnimationFrame);
    $("pause").textContent = video.paused ? "Play" : "Pause";
    if (video.duration) $("seek").value = video.currentTime / video.duration;
    if (video.currentTime === seen || video.seeking || !video.videoWidth) continue;
    seen = video.currentTime;
    try {
      const begin = performance.now();
      const [width, height] = [video.videoWidth, video.videoHeight];
      const pixels = { width, height, data: readPixels(video, width, height) };
      const read = performance.now() - begin;
      const found = await detect(pixels);
      if (turn !== state.turn || !found) return;
      await showPixels(pixels); // with its boxes, and not before them
      showAnswer(found.answer, next);
      const now = performance.now();
      const rate = `${(1000 / (now - last)).toFixed(1)} frames a second`;
      showLatency([["frame", read], ["canvas", found.ms.canvas], ["inference", found.ms.inference],
        ["whole", now - begin, true]], `Of the last frame, by stage${next && !video.paused ? `; ${rate}` : ""}.`);
      [last, next] = [now, true];
    } catch (error) {
      stop();
      problem(error.message || String(error));
    }
  }
}

function stop() {
  state.turn++;
  const video = $("video");
  video.pause();
  for (const track of video.srcObject?.getTracks() || []) track.stop();
  video.srcObject = null;
  video.removeAttribute("src");
  video.load(); // lets go of what it played
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = null;
  $("player").hidden = true;
  $("busy").hidden = true;
  $("summary").removeAttribute("aria-live");
}

async function openCamera() {
  if (!navigator.mediaDevices) {
    problem("The camera is only there on https:// and on localhost.");
    return;
  }
  try {
    play(await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }));
  } catch (error) {
    problem(`The camera cannot be used: ${error.message}`);
  }
}

// ---- ways in

listen(take);
$("camera").addEventListener("click", openCamera);
$("before").addEventListener("click", () => showFile(state.at - 1));
$("after").addEventListener("click", () => showFile(state.at + 1));
$("pause").addEventListener("click", () => { $("video")[$("video").paused ? "play" : "pause"](); });
$("stop").addEventListener("click", stop);
$("seek").addEventListener("input", () => { $("video").currentTime = $("seek").value * ($("video").duration || 0); });
$("model").addEventListener("change", open);
start();
