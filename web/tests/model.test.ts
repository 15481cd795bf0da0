/** The model's answers are Python's, in conversations that keep their KV cache. */

import * as ort from "onnxruntime-web";
import { expect, test } from "vitest";
import { Downloads } from "../src/files";
import { FlashSloth, readModel, type AnswerPart, type ModelFiles, type Runtime } from "../src/model";
import { read, readImage, reference } from "./reference";

class LocalFiles extends Downloads {
  constructor(private readonly name: string) {
    super(`file:///${name}/`);
  }

  override bytes(name: string): Promise<Uint8Array> {
    return Promise.resolve(read(`${this.name}/${name}`));
  }
}

async function load(name: string, change: (files: ModelFiles) => void = () => {}): Promise<FlashSloth> {
  const files = await readModel(name, new LocalFiles(name));
  change(files);
  return FlashSloth.create(ort as unknown as Runtime, files, "wasm");
}

const GREEDY = { maxNewTokens: 64, temperature: 0, topK: 50, topP: 1 };

async function ask(model: FlashSloth, question: string, settings = GREEDY, signal?: AbortSignal): Promise<AnswerPart> {
  let last: AnswerPart = { text: "" };
  for await (const part of model.ask(question, settings, signal)) {
    expect(part.text.startsWith(last.text)).toBe(true);
    last = { ...last, ...part, attention: last.attention ?? part.attention };
  }
  return last;
}

test("several questions about one image are answered and attended as in Python", { timeout: 120_000 }, async () => {
  const model = await load("float32");
  for (const { file, turns } of reference.chats) {
    await model.showImage(readImage(file));
    for (const [index, { question, answer, attention }] of turns.entries()) {
      const found = await ask(model, question);
      expect(found.text).toBe(answer);
      found.attention!.forEach((value, key) => expect(value).toBeCloseTo(attention[key], 4));
      expect(found.timings!.numCached > 0).toBe(index > 0);
    }
  }
});

test("an image in five tiles is read as in Python", { timeout: 120_000 }, async () => {
  const model = await load("float32", (files) => (files.processor.image_processor.do_image_splitting = true));
  const { file, question, answer, attention } = reference.split;
  await model.showImage(readImage(file));
  expect(model.numTiles).toBe(5);
  const found = await ask(model, question);
  expect(found.text).toBe(answer);
  found.attention!.forEach((value, key) => expect(value).toBeCloseTo(attention[key], 4));
});

test("a new conversation about the same image gives the same answers", { timeout: 120_000 }, async () => {
  const model = await load("float32");
  const { file, turns } = reference.chats[0];
  await model.showImage(readImage(file));
  const first = await ask(model, turns[0].question);
  await ask(model, turns[1].question);
  model.forget();
  const again = await ask(model, turns[0].question);
  expect(again.text).toBe(first.text);
  expect(again.timings!.numCached).toBeGreaterThan(0); // the image
  expect(again.timings!.numComputed).toBeLessThan(first.timings!.numComputed);
});

test("a stopped answer ends and the conversation goes on", { timeout: 120_000 }, async () => {
  const model = await load("float32");
  const { file, turns } = reference.chats[1];
  await model.showImage(readImage(file));
  const stop = new AbortController();
  let whole = "";
  for await (const part of model.ask("Describe the picture.", GREEDY, stop.signal)) {
    whole = part.text;
    if (part.timings) expect(part.timings.numTokens).toBe(2);
    else if (part.text.split(" ").length === 2) stop.abort();
  }
  expect(whole.split(" ").length).toBe(2);
  expect((await ask(model, turns[0].question)).text).not.toBe("");
});

test("a conversation that is too long is refused", { timeout: 120_000 }, async () => {
  const model = await load("float32");
  await model.showImage(readImage(reference.chats[0].file));
  await expect(ask(model, "star ".repeat(3000))).rejects.toThrow(/too long: .* has \d+ tokens/);
  expect((await ask(model, reference.chats[0].turns[0].question)).text).toBe(reference.chats[0].turns[0].answer);
});
