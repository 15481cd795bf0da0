/** Errors in the visitor's words. */

/** An error that is explained to the visitor. */
export class PageError extends Error {}

/** What the page says about an error: its message if it is a `PageError`, else what can be done about it. */
export function describeError(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  if (error instanceof PageError) return text;
  if (error instanceof RangeError || /out of memory|allocat|std::bad_alloc|OOM/i.test(text)) {
    return "The browser has no memory left for this: close other pages, take a smaller picture, or a smaller model.";
  }
  return `Something went wrong: ${text}`;
}
