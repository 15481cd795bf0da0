/** Runs the model off the page's thread, so that the page reacts while the model computes. */

import wasmAddress from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import webgpuAddress from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import { PageError, describeError } from "./errors";
import { Downloads, modelAddress } from "./files";
import { decodeImage, rgbToRgba, rgbaToRgb } from "./image";
import { FlashSloth, readModel, type ModelFiles, type Runtime } from "./model";
import type { ModelInfo, Reply, Request } from "./protocol";
import type { RgbImage } from "./resize";

const MAX_SHOWN_SIDE = 1024; // pixels
const MAX_THREADS = 4; // more do not help small models

let model: FlashSloth | undefined;
let answering: AbortController | undefined;
let queue: Promise<void> = Promise.resolve();

declare global {
  interface Navigator {
    gpu?: { requestAdapter(): Promise<object | null> };
  }
}

const reply = (message: Reply, transfer: Transferable[] = []): void => self.postMessage(message, { transfer });

self.onmessage = ({ data }: MessageEvent<Request>) => {
  if (data.type === "stop") answering?.abort();
  else
    queue = queue
      .then(() => handle(data))
      .catch((error: unknown) => {
        reply({ type: "error", during: data.type, message: describeError(error) });
      });
};

async function handle(request: Exclude<Request, { type: "stop" }>): Promise<void> {
  if (request.type === "load") return load(request);
  if (!model) throw new PageError("The model is not loaded.");
  if (request.type === "show") return show(model, request.image);
  if (request.type === "ask") return ask(model, request);
  return model.forget();
}

async function load(request: Extract<Request, { type: "load" }>): Promise<void> {
  const begin = performance.now();
  const folder = modelAddress(request.model, request.page);
  const downloads = new Downloads(folder, (loaded, total) => {
    reply({ type: "progress", loaded, total, what: "Loading the model" });
  });
  const provider = await chooseProvider(request.backend);
  const files = readModel(folder, downloads);
  files.catch(() => {}); // reported below
  let backend: string;
  [model, backend] = await start(provider, files, downloads, request);
  const { defaults, numTiles, patchSize } = model;
  const seconds = (performance.now() - begin) / 1000;
  const { modelBytes } = await files;
  const runtimeBytes = downloads.numBytes - modelBytes;
  const info: ModelInfo = { backend, seconds, modelBytes, runtimeBytes, defaults, numTiles, patchSize };
  reply({ type: "loaded", ...info });
}

async function chooseProvider(wanted: string | null): Promise<"webgpu" | "wasm"> {
  if (wanted === "wasm") return "wasm";
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter) return "webgpu";
  if (wanted === "webgpu") throw new PageError("This browser offers no WebGPU; remove `backend` from the address.");
  return "wasm";
}

/** Start the model, with WebAssembly if WebGPU fails. */
async function start(
  provider: "webgpu" | "wasm",
  files: Promise<ModelFiles>,
  downloads: Downloads,
  request: Extract<Request, { type: "load" }>,
): Promise<[FlashSloth, string]> {
  const isGpu = provider === "webgpu";
  const runtime = isGpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, MAX_THREADS) : 1;
  runtime.env.wasm.numThreads = request.numThreads ?? numThreads;
  const binary = await downloads.bytes(new URL(isGpu ? webgpuAddress : wasmAddress, request.page).href);
  runtime.env.wasm.wasmBinary = binary.buffer as ArrayBuffer;
  const read = await files;
  reply({ type: "progress", loaded: 0, total: 0, what: "Starting the model" });
  try {
    const created = await FlashSloth.create(runtime as unknown as Runtime, read, provider);
    const threads = runtime.env.wasm.numThreads;
    return [created, isGpu ? "WebGPU" : `WebAssembly, ${threads === 1 ? "one thread" : `${threads} threads`}`];
  } catch (error) {
    if (!isGpu || request.backend === "webgpu") throw error;
    return start("wasm", files, downloads, request);
  }
}

async function show(shown: FlashSloth, image: Blob | ImageData): Promise<void> {
  const rgb = image instanceof Blob ? await decodeImage(image) : rgbaToRgb(image.width, image.height, image.data);
  const seconds = await shown.showImage(rgb);
  const bitmap = await toBitmap(rgb);
  const pooling = shown.poolingWeights.slice();
  reply({ type: "shown", bitmap, width: rgb.width, height: rgb.height, seconds, pooling }, [bitmap]);
}

function toBitmap(image: RgbImage): Promise<ImageBitmap> {
  const scale = Math.min(1, MAX_SHOWN_SIDE / Math.max(image.width, image.height));
  return createImageBitmap(new ImageData(rgbToRgba(image), image.width, image.height), {
    resizeWidth: Math.max(1, Math.round(image.width * scale)),
    resizeHeight: Math.max(1, Math.round(image.height * scale)),
    resizeQuality: "high",
  });
}

/** Unlike a timer, it takes no 4 ms. */
function nextTask(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve();
    port2.postMessage(null);
  });
}

async function ask(asked: FlashSloth, request: Extract<Request, { type: "ask" }>): Promise<void> {
  answering = new AbortController();
  try {
    for await (const part of asked.ask(request.question, request.settings, answering.signal)) {
      if (part.timings) reply({ ...part, type: "answered", timings: part.timings });
      else reply({ ...part, type: "part" });
      await nextTask(); // a message such as "stop" can arrive
    }
  } finally {
    answering = undefined;
  }
}
