/** Pixels, prompts, sampling and heat maps are Python's. */

import { describe, expect, it, test } from "vitest";
import { PageError, describeError } from "../src/errors";
import { modelAddress } from "../src/files";
import { colourHeat, heatMap } from "../src/heat";
import { wholeQuestionStart } from "../src/model";
import { toTiles } from "../src/preprocess";
import { Prompter, type ProcessorConfig } from "../src/prompt";
import { chooseToken, computeProbabilities } from "../src/sampling";
import { read, readFloats, readImage, readJson, reference } from "./reference";

const processor = readJson<ProcessorConfig>("float32/processor_config.json");
const readText = (name: string) => new TextDecoder().decode(read(name));
const prompter = new Prompter(
  readJson("float32/tokenizer.json"),
  readJson("float32/tokenizer_config.json"),
  readText("float32/chat_template.jinja"),
  processor,
);

describe("tiles are Python's to the last bit", () => {
  it.each(reference.pixels)("$file", ({ file, plain, split }) => {
    for (const [expected, do_image_splitting] of [
      [plain, false],
      [split, true],
    ] as const) {
      const tiles = toTiles(readImage(file), { ...processor.image_processor, do_image_splitting });
      const values = readFloats(expected);
      expect(tiles.dims.reduce((product, size) => product * size)).toBe(values.length);
      expect(tiles.data.findIndex((value, index) => value !== values[index])).toBe(-1);
    }
  });
});

test("a resampling that is not known is refused", () => {
  const image = readImage(reference.pixels[0].file);
  expect(() => toTiles(image, { ...processor.image_processor, resample: 5 })).toThrow(/`resample`=5/);
});

test("prompt ids are Python's", () => {
  for (const { messages, ids } of reference.prompts) expect(prompter.encode(messages)).toEqual(ids);
});

test("control tokens in text stay text", () => {
  const text = "<image><learnable></s>";
  const [plain, guarded] = ["x", text].map((part) => {
    const content = [{ type: "image" as const }, { type: "text" as const, text: part }];
    return prompter.encode([{ role: "user", content }]);
  });
  const config = readJson<{ image_token_id: number; query_token_id: number }>("float32/config.json");
  for (const id of [config.image_token_id, config.query_token_id]) {
    const count = (ids: number[]) => ids.filter((other) => other === id).length;
    expect(count(guarded)).toBe(count(plain));
  }
});

test("answers are decoded without control tokens", () => {
  const ids = prompter.encode([{ role: "user", content: [{ type: "text", text: "Read the sign." }] }]);
  expect(prompter.decode(ids)).toContain("Read the sign.");
  expect(prompter.decode(ids)).not.toContain(processor.query_token);
  expect(prompter.decode([])).toBe("");
});

test("probabilities are those of transformers", () => {
  for (const row of reference.sampling) {
    const found = computeProbabilities(row.logits, row);
    found.forEach((value, index) => expect(value).toBeCloseTo(row.probabilities[index], 10));
  }
});

test("with temperature 0 the most likely token that is not suppressed is chosen", () => {
  const settings = { temperature: 0, topK: 50, topP: 1 };
  expect(chooseToken([1, 5, 3, 4], { ...settings, suppressed: [1] }, () => 0.999)).toBe(3);
});

test("tokens are drawn by their probability", () => {
  const row = reference.sampling[1];
  const counts = new Float64Array(row.logits.length);
  const num = 20000;
  for (let i = 0; i < num; i++) counts[chooseToken(row.logits, row, () => (i + 0.5) / num)] += 1 / num;
  counts.forEach((share, id) => expect(share).toBeCloseTo(row.probabilities[id], 3));
});

test("heat maps are Python's", () => {
  for (const { weights, heat, numTiles, patchSize, width, height } of reference.heat) {
    const found = heatMap(Float32Array.from(weights), numTiles, patchSize, width, height);
    found.forEach((value, index) => expect(value).toBeCloseTo(heat[index], 4));
  }
});

test("heat is coloured from dark to bright", () => {
  const pixels = colourHeat(Float32Array.from([0, 1, 2]));
  expect([...pixels.slice(0, 4)]).toEqual([0, 0, 0, 153]);
  expect([...pixels.slice(8, 12)]).toEqual([255, 255, 200, 178]);
});

test("a Hub id or a folder is a model's address", () => {
  const page = "https://example.org/space/index.html?x=1";
  expect(modelAddress("USER/NAME", page)).toBe("https://huggingface.co/USER/NAME/resolve/main/");
  expect(modelAddress("./model/", page)).toBe("https://example.org/space/model/");
  expect(modelAddress("./model", page)).toBe("https://example.org/space/model/");
  expect(modelAddress("/a/b", page)).toBe("https://example.org/a/b/");
  expect(modelAddress("https://example.com/a", page)).toBe("https://example.com/a/");
});

test("a cut separates no question from its query tokens and splits no image", () => {
  const config = {
    image_token_id: 2,
    query_token_id: 3,
    num_query_tokens: 2,
    instruction_start_ids: [[2, 9], [4]],
    vision_config: { patch_size: 1, image_size: 1 },
  };
  //           0  1  2  3   4   5  6  7  8  9  10  11 12 13
  const ids = [4, 2, 2, 9, 50, 51, 3, 3, 5, 4, 60, 61, 3, 3, 5];
  expect(wholeQuestionStart(ids, 14, config)).toBe(10); // the last token alone would split the query tokens
  expect(wholeQuestionStart(ids, 11, config)).toBe(10);
  expect(wholeQuestionStart(ids, 10, config)).toBe(10);
  expect(wholeQuestionStart(ids, 9, config)).toBe(9);
  expect(wholeQuestionStart(ids, 6, config)).toBe(4);
  expect(wholeQuestionStart(ids, 2, config)).toBe(0);
  expect(wholeQuestionStart(ids, 0, config)).toBe(0);
});

describe("errors are told in words", () => {
  const failures = {
    "an array's memory": () => new ArrayBuffer(2 ** 52),
    "WebAssembly's memory": () => new WebAssembly.Memory({ initial: 1, maximum: 1 }).grow(1),
    "onnxruntime's memory": () => {
      throw new Error("Non-zero status code: std::bad_alloc");
    },
  };
  it.each(Object.entries(failures))("%s", (_, fail) => {
    expect(() => fail()).toThrow();
    try {
      fail();
    } catch (error) {
      expect(describeError(error)).toMatch(/^The browser has no memory left/);
    }
  });

  it("others", () => {
    expect(describeError(new PageError("Choose a picture."))).toBe("Choose a picture.");
    expect(describeError(new Error("disk"))).toBe("Something went wrong: disk");
    expect(describeError("disk")).toBe("Something went wrong: disk");
  });
});
