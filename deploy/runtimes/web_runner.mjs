// ONNX Runtime Web in Node, for deploy/runtimes/web.py: node web_runner.mjs RUNTIME MODEL
//
// stdin: for each call the length of a line (uint32), the line { type, dims } as JSON, and the bytes of the images.
// stdout: the same, with a line { outputs: [{ name, type, dims }] } and the bytes of all of them, or { error }. The first
// line, before any call, is { outputs: [] } or { error }.

import fs from "node:fs";
import { pathToFileURL } from "node:url";
import { gunzipSync } from "node:zlib";

const BYTES = { uint8: 1, float32: 4, int32: 4, int64: 8 };
const [runtime, model] = process.argv.slice(2);
globalThis.self ??= globalThis; // as in a browser

function answer(line, parts = []) {
  const text = Buffer.from(JSON.stringify(line));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  for (const part of [length, text, ...parts]) {
    for (let at = 0; at < part.length;) at += fs.writeSync(1, part, at);
  }
}

function read(count) {
  const bytes = Buffer.alloc(count);
  for (let at = 0; at < count;) {
    const many = fs.readSync(0, bytes, at, count - at);
    if (many === 0) process.exit(0); // the other side is gone
    at += many;
  }
  return bytes;
}

async function open() {
  const ort = await import(pathToFileURL(`${runtime}/ort.js`));
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { mjs: pathToFileURL(`${runtime}/plain.js`).href };
  ort.env.wasm.wasmBinary = gunzipSync(fs.readFileSync(`${runtime}/plain.wasm.gz`));
  const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(model)), {
    executionProviders: ["wasm"] });
  return { ort, session };
}

async function run({ ort, session }) {
  const { type, dims } = JSON.parse(read(read(4).readUInt32LE()));
  const bytes = read(dims.reduce((a, b) => a * b, BYTES[type]));
  const data = type === "float32" ? new Float32Array(bytes.buffer, 0, bytes.length / 4) : new Uint8Array(bytes.buffer);
  const found = await session.run({ images: new ort.Tensor(type, data, dims) });
  const names = session.outputNames;
  const outputs = names.map((name) => ({ name, type: found[name].type, dims: found[name].dims }));
  answer({ outputs }, names.map((name) => Buffer.from(found[name].data.buffer, found[name].data.byteOffset,
    found[name].data.byteLength)));
  for (const tensor of Object.values(found)) tensor.dispose();
}

const said = (error) => String(error?.message ?? error).split("\n")[0];
let opened;
try {
  opened = await open();
} catch (error) {
  answer({ error: said(error) });
  process.exit(0);
}
answer({ outputs: [] });
for (;;) {
  try {
    await run(opened);
  } catch (error) {
    answer({ error: said(error) });
  }
}
