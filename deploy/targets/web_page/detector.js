// The exported file in ONNX Runtime Web: pixels in, an answer as view.js shows it out.
//
// The folder holds two builds of the runtime. "jspi" can also use WebGPU, where the browser lets WebAssembly wait for it
// (JavaScript Promise Integration); "plain" is for all others. Both are packed with gzip, because few servers pack.

import { fitCanvas, toOriginal } from "./canvas.js";

const RUNTIME = new URL("./runtime/", import.meta.url);
const BUILD = "Suspending" in WebAssembly ? "jspi" : "plain";
let ort; // the runtime, once it is loaded

// Names of what can run the file in this browser, best first. A graphics card that the CPU only plays is left out
// unless `software`: it is slower than the CPU itself.
export async function backends(software = false) {
  const adapter = BUILD === "jspi" ? await navigator.gpu?.requestAdapter().catch(() => null) : null;
  const played = adapter && (adapter.info?.isFallbackAdapter || adapter.isFallbackAdapter);
  return adapter && (software || !played) ? ["webgpu", "wasm"] : ["wasm"];
}

// Open the file on one of these. about: what model.json holds. say(text): called with what is going on.
// Returns { backend, detect }, as below. Raises Error.
export async function openDetector(about, backend, say) {
  say("loading the runtime");
  ort ??= await loadRuntime();
  say("loading the model");
  const model = await read(new URL(`./${about.model}`, import.meta.url));
  say("warming up");
  const session = await ort.InferenceSession.create(new Uint8Array(model), {
    executionProviders: [backend], freeDimensionOverrides: { batch: 1 } });
  const detector = {
    // What runs it, for people.
    backend: backend === "webgpu" ? "WebGPU" : `wasm, ${threads() === 1 ? "1 thread" : `${threads()} threads`}`,
    detect: (pixels) => detect(session, about.card, pixels),
    close: () => session.release(),
  };
  await detector.detect({ width: 1, height: 1, data: new Uint8ClampedArray(4) }); // the first one is slow
  return detector;
}

// ---- details

// pixels: { width, height, data: RGBA bytes }. Returns { answer, ms: { canvas, inference } }.
async function detect(session, card, pixels) {
  const start = performance.now();
  const { canvas, scale } = fitCanvas(pixels, card);
  const kind = card.form.images;
  const data = kind === "float32" ? Float32Array.from(canvas) : canvas;
  const middle = performance.now();
  const out = await session.run({ images: new ort.Tensor(kind, data, [1, 3, ...card.input_size]) });
  const end = performance.now();
  const [boxes, scores, labels] = [out.boxes.data, out.scores.data, out.labels.data];
  const detections = Array.from({ length: Number(out.count.data[0]) }, (_, at) => {
    const label = Number(labels[at]); // a BigInt, because labels are int64
    const box = toOriginal(boxes.subarray(4 * at, 4 * at + 4), scale, pixels);
    return { box, score: scores[at], label, class_name: card.class_names[label], category_id: card.category_ids[label] };
  });
  for (const tensor of Object.values(out)) tensor.dispose();
  const { width, height } = pixels;
  return { answer: { width, height, detections }, ms: { canvas: middle - start, inference: end - middle } };
}

// Threads share memory, which a browser allows on isolated pages only.
function threads() {
  return self.crossOriginIsolated ? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2)) : 1;
}

async function loadRuntime() {
  const runtime = await import(new URL("ort.js", RUNTIME));
  runtime.env.logLevel = "error";
  runtime.env.wasm.numThreads = threads();
  runtime.env.wasm.wasmPaths = { mjs: new URL(`${BUILD}.js`, RUNTIME).href };
  runtime.env.wasm.wasmBinary = await unpacked(await read(new URL(`${BUILD}.wasm.gz`, RUNTIME)));
  return runtime;
}

async function read(url) {
  const response = await fetch(url).catch(() => ({}));
  if (!response.ok) throw new Error(`${url.pathname.split("/").pop()} did not come: ${response.status || "no answer"}`);
  return response.arrayBuffer();
}

// Some servers send a .gz file as one that the browser unpacks by itself.
async function unpacked(bytes) {
  const [first, second] = new Uint8Array(bytes, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return bytes;
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
