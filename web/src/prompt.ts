/** From conversations to token ids and back, as `FlashSlothProcessor` does. */

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { countTiles, type ImageSettings } from "./preprocess";

export interface Message {
  role: "user" | "assistant";
  content: { type: "image" | "text"; text?: string }[];
}

/** processor_config.json. */
export interface ProcessorConfig {
  image_processor: ImageSettings;
  image_token: string;
  query_token: string;
  image_seq_length: number;
  num_query_tokens: number;
}

/**
 * A Unicode noncharacter that keeps text such as `<image>` from becoming a control token: it is inserted before special
 * tokens are matched, and the tokenizer's normalizer removes it again.
 */
const GUARD = "\ufdd0";

const escapeRegExp = (text: string): string => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

const matchAny = (tokens: Iterable<string>): RegExp =>
  new RegExp(
    [...new Set(tokens)]
      .sort((a, b) => b.length - a.length)
      .map(escapeRegExp)
      .join("|"),
    "gu",
  );

/** Prompts and answers of one model. */
export class Prompter {
  private readonly tokenizer: Tokenizer;
  private readonly template: Template;
  private readonly specialTokens: Record<string, string>;
  private readonly controlTokens: RegExp;
  private readonly placeholders: RegExp;

  constructor(
    tokenizer: object,
    tokenizerConfig: Record<string, unknown>,
    template: string,
    private readonly config: ProcessorConfig,
  ) {
    this.tokenizer = new Tokenizer(tokenizer, tokenizerConfig);
    this.template = new Template(template);
    const special = Object.entries(tokenizerConfig)
      .filter(([name]) => /^(bos|eos|pad|unk|sep|cls|mask)_token$/.test(name))
      .map(([name, token]) => [name, (token as { content?: string } | null)?.content ?? token])
      .filter(([, token]) => typeof token === "string");
    this.specialTokens = Object.fromEntries(special) as Record<string, string>;
    const added = [...this.tokenizer.get_added_tokens_decoder().values()].filter((token) => token.special);
    const { image_token, query_token } = config;
    this.controlTokens = matchAny([...added.map((token) => token.content), image_token, query_token]);
    this.placeholders = matchAny([image_token, query_token]);
  }

  /** The longest prompt with its answer, in tokens. */
  get maxLength(): number {
    return (this.tokenizer as unknown as { config: { model_max_length?: number } }).config.model_max_length ?? Infinity;
  }

  /** Token ids of a conversation that the model is to continue. */
  encode(messages: Message[]): number[] {
    const guarded = messages.map((message) => ({
      ...message,
      content: message.content.map((part) =>
        part.text === undefined ? part : { ...part, text: this.guard(part.text) },
      ),
    }));
    const prompt = this.template.render({ messages: guarded, add_generation_prompt: true, ...this.specialTokens });
    const { image_token, query_token, image_seq_length, num_query_tokens, image_processor } = this.config;
    const image = image_token.repeat(image_seq_length * countTiles(image_processor));
    const query = query_token.repeat(num_query_tokens);
    const expanded = prompt.replace(this.placeholders, (token) => (token === image_token ? image : query));
    const bos = this.specialTokens.bos_token;
    return this.tokenizer.encode(expanded, { add_special_tokens: !(bos && prompt.startsWith(bos)) }).ids;
  }

  /** Text of an answer, without control tokens and surrounding white space. */
  decode(ids: number[]): string {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }).trim() : "";
  }

  private guard(text: string): string {
    return text.replace(this.controlTokens, (token) => {
      const [first] = token;
      return first + GUARD + token.slice(first.length);
    });
  }
}
