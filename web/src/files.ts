/** Downloads files with progress, and keeps them in the browser's cache. */

import { PageError } from "./errors";

const CACHE_NAME = "flashsloth-files";
const HUB = "https://huggingface.co";
const HUB_ID = /^[\w.-]+\/[\w.-]+$/;

/** Bytes that are there, and bytes in all as far as they are known. */
export type OnProgress = (loaded: number, total: number) => void;

/**
 * The address of a model's folder.
 *
 * @param model A Hub id such as `USER/NAME`, or the address of a folder, relative to the page.
 */
export function modelAddress(model: string, page: string): string {
  if (HUB_ID.test(model) && !model.startsWith(".")) return `${HUB}/${model}/resolve/main/`;
  return new URL(model.endsWith("/") ? model : `${model}/`, page).href;
}

/** A group of files that is downloaded together. */
export class Downloads {
  private readonly loaded = new Map<string, number>();
  private readonly totals = new Map<string, number>();

  constructor(
    private readonly folder: string,
    private readonly onProgress: OnProgress = () => {},
  ) {}

  /** Size of all files so far. */
  get numBytes(): number {
    return [...this.loaded.values()].reduce((sum, length) => sum + length, 0);
  }

  async json<T>(name: string): Promise<T> {
    const bytes = await this.bytes(name);
    try {
      return JSON.parse(new TextDecoder().decode(bytes)) as T;
    } catch {
      throw new PageError(`${this.folder}${name} is not JSON: there is no model, or it is damaged.`);
    }
  }

  async text(name: string): Promise<string> {
    return new TextDecoder().decode(await this.bytes(name));
  }

  /**
   * The content of a file, from the cache if the server's copy is the same or cannot be reached.
   *
   * @param name Name in the folder, or a whole address.
   */
  async bytes(name: string): Promise<Uint8Array> {
    const address = new URL(name, this.folder).href;
    const cache = await openCache();
    const cached = await cache?.match(address);
    const response = cached && (await isCurrent(address, cached)) ? cached : await this.fetch(address, cached);
    const bytes = await this.read(address, response);
    if (response !== cached) await store(cache, address, response, bytes);
    return bytes;
  }

  private async fetch(address: string, cached: Response | undefined): Promise<Response> {
    let response: Response;
    try {
      response = await fetch(address, { cache: "no-cache" });
    } catch {
      if (cached) return cached;
      throw new PageError(
        `${address} cannot be reached: the computer is offline, or the server does not allow other pages to read it.`,
      );
    }
    if (response.ok) return response;
    const isMissing = [401, 403, 404].includes(response.status);
    throw new PageError(
      isMissing
        ? `Model not found: ${address} does not exist or is private. ` +
            "`?model=` takes a folder that `flashsloth onnx` wrote, or the Hub id of a repository with its files."
        : `${address} cannot be read: the server answered with status ${response.status}. Try again later.`,
    );
  }

  private async read(address: string, response: Response): Promise<Uint8Array> {
    const total = Number(response.headers.get("Content-Length")) || 0;
    this.totals.set(address, total);
    const chunks: Uint8Array[] = [];
    let length = 0;
    const reader = response.body!.getReader();
    try {
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        chunks.push(part.value);
        length += part.value.length;
        this.report(address, length);
      }
    } catch {
      throw new PageError(`The connection broke while ${address} was loading; reload the page to go on.`);
    }
    this.totals.set(address, length);
    this.report(address, length);
    const bytes = new Uint8Array(length);
    let offset = 0;
    for (const chunk of chunks) {
      bytes.set(chunk, offset);
      offset += chunk.length;
    }
    return bytes;
  }

  private report(address: string, length: number): void {
    this.loaded.set(address, length);
    const total = [...this.totals.values()].reduce((sum, size) => sum + size, 0);
    this.onProgress(this.numBytes, Math.max(this.numBytes, total));
  }
}

/** The cache; `undefined` where browsers forbid it, as on pages that are not secure. */
async function openCache(): Promise<Cache | undefined> {
  try {
    return await caches.open(CACHE_NAME);
  } catch {
    return undefined;
  }
}

/** Whether the server still has the cached file. A server that cannot be reached, or does not tell, has not changed. */
async function isCurrent(address: string, cached: Response): Promise<boolean> {
  try {
    const now = await fetch(address, { method: "HEAD", cache: "no-cache" });
    const names = ["ETag", "Last-Modified", "Content-Length"];
    const known = names.filter((name) => now.headers.get(name) && cached.headers.get(name));
    return now.ok && known.every((name) => now.headers.get(name) === cached.headers.get(name));
  } catch {
    return true;
  }
}

async function store(cache: Cache | undefined, address: string, response: Response, bytes: Uint8Array): Promise<void> {
  try {
    await cache?.put(address, new Response(bytes as BodyInit, { headers: response.headers }));
  } catch {
    // no room: the file is downloaded again next time
  }
}
