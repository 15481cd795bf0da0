/**
 * FlashSloth with the three graphs of `flashsloth onnx`.
 *
 *   image ─ vision.onnx ─ patch features, image tokens (once per image)
 *   prompt, or what follows the cached one ─ decoder.onnx ─ logits, attention of the query tokens, KV cache
 *   one token ─ decoder_step.onnx ─ logits, KV cache
 */

import type { InferenceSession, Tensor, TypedTensor } from "onnxruntime-web";
import { Downloads } from "./files";
import { PageError } from "./errors";
import { countTiles, toTiles } from "./preprocess";
import { Prompter, type Message, type ProcessorConfig } from "./prompt";
import type { RgbImage } from "./resize";
import { chooseToken, type SamplingSettings } from "./sampling";

/** The parts of onnxruntime that are used; its builds for the browser and for Node have the same. */
export interface Runtime {
  InferenceSession: {
    create(model: Uint8Array, options: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  Tensor: typeof Tensor;
}

interface ModelConfig {
  image_token_id: number;
  query_token_id: number;
  num_query_tokens: number;
  instruction_start_ids: number[][];
  vision_config: { patch_size: number | number[]; image_size: number | number[] };
}

interface GenerationConfig {
  eos_token_id: number | number[];
  suppress_tokens?: number[] | null;
  do_sample?: boolean;
  temperature?: number;
  top_k?: number;
  top_p?: number;
}

/** Everything that `flashsloth onnx` wrote, except code. */
export interface ModelFiles {
  config: ModelConfig;
  generation: GenerationConfig;
  processor: ProcessorConfig;
  prompter: Prompter;
  graphs: Record<GraphName, { graph: Uint8Array; weights: { path: string; data: Uint8Array }[] }>;
  /** Size of the graphs with their weights. */
  modelBytes: number;
}

type GraphName = "vision" | "decoder" | "decoder_step";
type Feeds = Record<string, Tensor>;

export interface AnswerSettings {
  maxNewTokens: number;
  temperature: number;
  topK: number;
  topP: number;
}

/** Seconds that parts of an answer took. */
export interface Timings {
  firstToken: number;
  /** Mean of all further tokens. */
  perToken: number;
  numTokens: number;
  /** Tokens of the prompt that were computed now, and those that the KV cache had. */
  numComputed: number;
  numCached: number;
}

/** What an answer is made of; `text` grows. */
export interface AnswerPart {
  text: string;
  /** With the first part: attention of the question to the patches of all tiles; sums to 1. */
  attention?: Float32Array;
  /** With the last part. */
  timings?: Timings;
}

const now = (): number => performance.now() / 1000;
const asArray = <T>(value: T | T[]): T[] => (Array.isArray(value) ? value : [value]);

/** Read all files of a model. */
export async function readModel(folder: string, downloads: Downloads): Promise<ModelFiles> {
  const config = await downloads.json<ModelConfig & { model_type?: string }>("config.json");
  if (config.model_type !== "flashsloth") {
    throw new PageError(
      `${folder} is not a FlashSloth: its config.json has the model_type ${JSON.stringify(config.model_type)}.`,
    );
  }
  const readGraph = async (name: GraphName) => ({ graph: await downloads.bytes(`${name}.onnx`), weights: [] });
  const readWeights = async (name: string) => ({ path: name, data: await downloads.bytes(name) });
  const [generation, processor, tokenizer, tokenizerConfig, template, vision, decoder, step, seen, known] =
    await Promise.all([
      downloads.json<GenerationConfig>("generation_config.json"),
      downloads.json<ProcessorConfig>("processor_config.json"),
      downloads.json<object>("tokenizer.json"),
      downloads.json<Record<string, unknown>>("tokenizer_config.json"),
      downloads.text("chat_template.jinja"),
      readGraph("vision"),
      readGraph("decoder"),
      readGraph("decoder_step"),
      readWeights("vision.onnx.data"),
      readWeights("decoder.onnx.data"),
    ]);
  const parts = [vision.graph, decoder.graph, step.graph, seen.data, known.data];
  return {
    config,
    generation,
    processor,
    prompter: new Prompter(tokenizer, tokenizerConfig, template, processor),
    graphs: {
      vision: { ...vision, weights: [seen] },
      decoder: { ...decoder, weights: [known] },
      decoder_step: { ...step, weights: [known] },
    },
    modelBytes: parts.reduce((sum, part) => sum + part.length, 0),
  };
}

/** A model that answers questions about one image after another. */
export class FlashSloth {
  private features: Feeds = {};
  private messages: Message[] = [];
  private cachedIds: number[] = [];
  private cache: Tensor[] = [];
  private pooling = new Float32Array();

  private constructor(
    private readonly runtime: Runtime,
    private readonly files: ModelFiles,
    private readonly sessions: Record<GraphName, InferenceSession>,
  ) {}

  /**
   * Load the graphs.
   *
   * @param provider "webgpu" or "wasm"; in Node, only the latter.
   */
  static async create(runtime: Runtime, files: ModelFiles, provider: "webgpu" | "wasm"): Promise<FlashSloth> {
    const create = (name: GraphName, options: InferenceSession.SessionOptions = {}) => {
      const { graph, weights } = files.graphs[name];
      return runtime.InferenceSession.create(graph, {
        executionProviders: [provider],
        externalData: weights,
        logSeverityLevel: 3, // errors
        ...options,
      });
    };
    const vision = await create("vision");
    const decoder = await create("decoder");
    // Between decoding steps, the KV cache stays in the GPU's memory.
    const cacheNames = decoder.outputNames.filter((name) => name.startsWith("present."));
    const locations = Object.fromEntries(cacheNames.map((name) => [name, "gpu-buffer" as const]));
    const decoder_step = await create(
      "decoder_step",
      provider === "webgpu" ? { preferredOutputLocation: locations } : {},
    );
    return new FlashSloth(runtime, files, { vision, decoder, decoder_step });
  }

  /** What `generate` would use. */
  get defaults(): Omit<AnswerSettings, "maxNewTokens"> {
    const { do_sample, temperature = 1, top_k = 50, top_p = 1 } = this.files.generation;
    return { temperature: do_sample ? temperature : 0, topK: top_k, topP: top_p };
  }

  get numTiles(): number {
    return countTiles(this.files.processor.image_processor);
  }

  /** Side of a patch as a fraction of the tile's. */
  get patchSize(): number {
    const { patch_size, image_size } = this.files.config.vision_config;
    return asArray(patch_size)[0] / asArray(image_size)[0];
  }

  /** Weight of every patch of all tiles in its pooling window. */
  get poolingWeights(): Float32Array {
    return this.pooling;
  }

  /** Encode an image, and begin a conversation about it. Returns the seconds that it took. */
  async showImage(image: RgbImage): Promise<number> {
    const begin = now();
    const tiles = toTiles(image, this.files.processor.image_processor);
    const pixels = new this.runtime.Tensor("float32", tiles.data, tiles.dims);
    const outputs = await this.sessions.vision.run({ pixel_values: pixels });
    this.features = { patch_features: outputs.patch_features, image_tokens: outputs.image_tokens };
    this.pooling = (await outputs.pooling_attentions.getData()) as Float32Array<ArrayBuffer>;
    this.releaseCache();
    this.cachedIds = [];
    this.forget();
    return now() - begin;
  }

  /** Begin a new conversation about the same image; the KV cache of the image stays. */
  forget(): void {
    this.messages = [];
  }

  /**
   * Answer the next question of the conversation.
   *
   * @param signal Ends the answer; what there is stays in the conversation.
   */
  async *ask(question: string, settings: AnswerSettings, signal?: AbortSignal): AsyncGenerator<AnswerPart> {
    const begin = now();
    const part = { type: "text" as const, text: question };
    const content = this.messages.length ? [part] : [{ type: "image" as const }, part];
    const messages: Message[] = [...this.messages, { role: "user", content }];
    const { prompter } = this.files;
    const ids = prompter.encode(messages);
    const room = Math.min(settings.maxNewTokens, prompter.maxLength - ids.length);
    if (room < 1) {
      throw new PageError(
        `The conversation is too long: with this question it has ${ids.length} tokens, and the model can process ` +
          `${prompter.maxLength} including the answer. Shorten the question, or begin a new conversation.`,
      );
    }
    const numCached = await this.keepCommonPrefix(ids);
    const fresh = ids.slice(numCached);
    let { logits, attention } = await this.prefill(fresh);
    const sampling = this.toSampling(settings);
    const ends = new Set(asArray(this.files.generation.eos_token_id));
    const answer: number[] = [];
    let text = "";
    let firstToken = 0;
    let numSteps = 0;
    while (!signal?.aborted) {
      const token = chooseToken(logits, sampling);
      firstToken ||= now() - begin;
      if (ends.has(token)) break;
      answer.push(token);
      const decoded = prompter.decode(answer);
      if (!decoded.endsWith("\ufffd")) text = decoded; // otherwise, a character is not complete yet
      yield { text, attention };
      attention = undefined;
      if (answer.length === room) break;
      logits = await this.step(token);
      numSteps++;
    }
    text = prompter.decode(answer);
    if (answer.length || !signal?.aborted) {
      this.messages = [...messages, { role: "assistant", content: [{ type: "text", text }] }];
    }
    const perToken = (now() - begin - firstToken) / Math.max(numSteps, 1);
    const timings = { firstToken, perToken, numTokens: answer.length, numComputed: fresh.length, numCached };
    yield { text, attention, timings };
  }

  private toSampling(settings: AnswerSettings): SamplingSettings {
    const { image_token_id, query_token_id } = this.files.config;
    return {
      ...settings,
      suppressed: [image_token_id, query_token_id, ...(this.files.generation.suppress_tokens ?? [])],
    };
  }

  /** Cut the KV cache back to the tokens that a prompt begins with, and return their number. */
  private async keepCommonPrefix(ids: number[]): Promise<number> {
    let length = 0;
    while (length < this.cachedIds.length && ids[length] === this.cachedIds[length]) length++;
    length = wholeQuestionStart(ids, length, this.files.config);
    if (length < this.cachedIds.length) {
      this.cache = await Promise.all(this.cache.map((states) => this.crop(states, length)));
      this.cachedIds.length = length;
    }
    return length;
  }

  private async crop(states: Tensor, length: number): Promise<Tensor> {
    const [batch, heads, oldLength, size] = states.dims;
    const data = (await states.getData(true)) as Float32Array;
    const kept = new Float32Array(batch * heads * length * size);
    for (let head = 0; head < batch * heads; head++) {
      const start = head * oldLength * size;
      kept.set(data.subarray(start, start + length * size), head * length * size);
    }
    return new this.runtime.Tensor("float32", kept, [batch, heads, length, size]);
  }

  private async prefill(fresh: number[]): Promise<{ logits: Float32Array; attention: Float32Array | undefined }> {
    const { image_token_id, query_token_id, num_query_tokens } = this.files.config;
    const numCachedTiles =
      this.cachedIds.filter((id) => id === image_token_id).length / this.files.processor.image_seq_length;
    const outputs = await this.run("decoder", fresh, {
      ...this.features,
      num_cached_tiles: new this.runtime.Tensor("int64", BigInt64Array.of(BigInt(numCachedTiles)), [1]),
    });
    const weights = (await outputs.query_attentions.getData()) as Float32Array;
    const numKeys = outputs.query_attentions.dims[2];
    const positions = fresh
      .flatMap((id, position) => (id === query_token_id ? [position] : []))
      .slice(-num_query_tokens);
    const attention = new Float32Array(numKeys);
    for (const position of positions) {
      for (let key = 0; key < numKeys; key++) attention[key] += weights[position * numKeys + key] / positions.length;
    }
    return { logits: (await outputs.logits.getData()) as Float32Array, attention };
  }

  private async step(token: number): Promise<Float32Array> {
    const outputs = await this.run("decoder_step", [token], {});
    return (await outputs.logits.getData()) as Float32Array;
  }

  /** Run a decoder graph on the tokens that follow the cached ones, and cache them. */
  private async run(name: "decoder" | "decoder_step", ids: number[], further: Feeds): Promise<Feeds> {
    const session = this.sessions[name];
    const { Tensor } = this.runtime;
    const length = this.cachedIds.length + ids.length;
    const pastNames = session.inputNames.filter((input) => input.startsWith("past."));
    if (!this.cache.length) this.cache = this.emptyCache();
    const feeds: Feeds = {
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
      ...further,
    };
    pastNames.forEach((past, index) => (feeds[past] = this.cache[index]));
    const outputs = (await session.run(feeds)) as Feeds;
    this.releaseCache();
    this.cache = pastNames.map((past) => outputs[past.replace("past.", "present.")]);
    this.cachedIds.push(...ids);
    return outputs;
  }

  private releaseCache(): void {
    for (const states of this.cache) if (states.location === "gpu-buffer") states.dispose();
    this.cache = [];
  }

  private emptyCache(): Tensor[] {
    const shapes = this.sessions.decoder_step.inputMetadata.filter((input) => input.name.startsWith("past."));
    return shapes.map((input) => {
      const [, heads, , size] = (input as InferenceSession.TensorValueMetadata).shape as number[];
      return new this.runtime.Tensor("float32", new Float32Array(), [1, heads, 0, size]) as TypedTensor<"float32">;
    });
  }
}

/**
 * The position, at or before another one, at which a prompt can be cut so that no question is separated from its query
 * tokens, and no image is split.
 */
export function wholeQuestionStart(ids: number[], cut: number, config: ModelConfig): number {
  const query = ids.indexOf(config.query_token_id, cut);
  const last = query < 0 ? ids.length : query;
  let start = 0; // where the latest instruction before the first query token begins
  for (const pattern of config.instruction_start_ids) {
    for (let begin = 0; begin + pattern.length <= last; begin++) {
      if (pattern.every((id, offset) => ids[begin + offset] === id)) start = Math.max(start, begin + pattern.length);
    }
  }
  let kept = Math.min(cut, start, ids.length - 2);
  while (kept > 0 && ids[kept] === config.image_token_id) kept--;
  return Math.max(kept, 0);
}
