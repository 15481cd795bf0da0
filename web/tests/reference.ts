/** What Python computes, written by tests/web_reference.py. */

import { existsSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { decode } from "fast-png";
import { pngToRgb } from "../src/image";
import type { Message } from "../src/prompt";
import type { RgbImage } from "../src/resize";

const folder = resolve(process.env.FLASHSLOTH_REFERENCE ?? "reference");

if (!existsSync(folder)) {
  throw new Error(`${folder} does not exist; write it with: python tests/web_reference.py web/reference`);
}

export const read = (name: string): Uint8Array => new Uint8Array(readFileSync(resolve(folder, name)));

export const readJson = <T>(name: string): T => JSON.parse(new TextDecoder().decode(read(name))) as T;

export const readImage = (name: string): RgbImage => pngToRgb(decode(read(name)));

export const readFloats = (name: string): Float32Array => new Float32Array(read(name).buffer);

export interface Sampled {
  temperature: number;
  topK: number;
  topP: number;
  logits: number[];
  suppressed: number[];
  probabilities: number[];
}

export interface Spread {
  numTiles: number;
  width: number;
  height: number;
  patchSize: number;
  weights: number[];
  heat: number[];
}

export const reference = readJson<{
  pixels: { file: string; plain: string; split: string }[];
  prompts: { messages: Message[]; ids: number[] }[];
  sampling: Sampled[];
  heat: Spread[];
  questions: { file: string; question: string; answer: string }[];
  split: { file: string; question: string; answer: string; attention: number[] };
  chats: { file: string; turns: { question: string; answer: string; attention: number[] }[] }[];
}>("reference.json");
