/** Messages between the page and its worker. */

import type { AnswerSettings, Timings } from "./model";

export type Request =
  | { type: "load"; model: string; page: string; backend: string | null; numThreads: number | null }
  | { type: "show"; image: Blob | ImageData }
  | { type: "ask"; question: string; settings: AnswerSettings }
  | { type: "stop" }
  | { type: "forget" };

/** What the page shows of a model. */
export interface ModelInfo {
  backend: string;
  seconds: number;
  /** Sizes of the model's files, and of WebAssembly. */
  modelBytes: number;
  runtimeBytes: number;
  defaults: Omit<AnswerSettings, "maxNewTokens">;
  numTiles: number;
  patchSize: number;
}

export interface ShownImage {
  /** The image as the model reads it, not larger than the page needs. */
  bitmap: ImageBitmap;
  width: number;
  height: number;
  seconds: number;
  pooling: Float32Array;
}

export type Reply =
  | { type: "progress"; loaded: number; total: number; what: string }
  | ({ type: "loaded" } & ModelInfo)
  | ({ type: "shown" } & ShownImage)
  | { type: "part"; text: string; attention?: Float32Array }
  | { type: "answered"; text: string; attention?: Float32Array; timings: Timings }
  | { type: "error"; during: Request["type"]; message: string };
